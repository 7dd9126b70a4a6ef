// One batch: how far it is, what failed, its files, and the work list.

import { batchPath, call, ended, key, save, watch } from "./api.js";
import { stateChip } from "./batches.js";
import { announce, fill, h, problem } from "./dom.js";
import { loadList } from "./store.js";
import { worklist } from "./worklist.js";
import { count, duration, label, modelText, rate, when } from "./words.js";

const FORMATS = [
  ["parquet", "parquet", "Parquet"], ["csv", "csv", "CSV"], ["jsonl", "jsonl", "JSON Lines"], ["fhir", "ndjson", "FHIR"],
];
const REFRESH = 8000; // ms between two looks at the work list of a batch that still runs

export async function showBatch(place, { signal, shown }, id) {
  let batch = await call(batchPath(id), { signal });
  const panel = h("section", { class: "panel progress-panel", "aria-label": "Progress" });
  const said = h("div", null);
  const failures = h("div", null);
  const list = h("section", { "aria-labelledby": "worklist-title" });
  const state = h("span", null);
  const exports = h("div", { class: "exports" });
  const rates = [];
  place.append(
    h("p", { class: "crumb" }, h("a", { href: "#/" }, "Batches")),
    h("div", { class: "title-row" }, h("h1", { tabindex: "-1" }, batch.name || batch.id), state, exports),
    panel, said, failures, list,
  );

  const cancel = h("button", { type: "button", class: "quiet", onclick: async () => {
    cancel.disabled = true;
    try {
      seen(await call(batchPath(id), { method: "DELETE" }));
      announce("The batch is being cancelled.");
    } catch (error) {
      fill(said, problem(error, "Not cancelled"));
      cancel.disabled = false;
    }
  } }, "Cancel this batch");

  let tenth = -1;
  function seen(now) {
    batch = now;
    if (now.images_per_second) rates.push(now.images_per_second);
    fill(state, stateChip(now));
    drawProgress(panel, now, rates, cancel);
    drawExports(exports, now, said);
    const reached = now.total ? Math.floor((10 * now.done) / now.total) : 0;
    if (reached > tenth && !ended(now) && now.done) announce(`${count(now.done)} of ${count(now.total)} images scored`);
    tenth = Math.max(tenth, reached);
  }

  let looking = false;
  async function look(fresh) {
    if (looking) return;
    looking = true;
    try {
      const found = await loadList(id, { fresh, signal });
      const held = list.contains(document.activeElement) ? document.activeElement : null;
      fill(list, worklist(id, found, { running: !ended(batch) }));
      // the new rows take over the focus of the old ones
      if (held?.id) document.getElementById(held.id)?.focus();
      else if (held) [...list.querySelectorAll("a")].find((one) => one.hash === held.hash)?.focus();
    } catch (error) {
      // a batch that has only begun has no list yet
      if (!signal.aborted && (ended(batch) || error.status >= 500)) fill(list, problem(error, "No work list"));
      else if (!signal.aborted && !list.hasChildNodes()) fill(
        list,
        h("h2", { id: "worklist-title" }, "Work list"),
        h("p", { class: "empty" }, "The work list appears when the first images are scored."),
      );
    } finally {
      looking = false;
    }
  }

  seen(batch);
  await look(!ended(batch));
  shown();
  if (batch.failed || batch.not_assessable) drawFailures(failures, id, batch, signal);
  if (ended(batch)) return;
  let last = Date.now();
  await watch(id, (now) => {
    seen(now);
    if (ended(now)) return;
    // rows must not move under the hand of someone who works in the list
    if (Date.now() - last > REFRESH && !list.contains(document.activeElement)) { last = Date.now(); look(true); }
  }, signal);
  if (signal.aborted) return;
  const how = batch.state === "finished" ? "is finished" : `has ${batch.state}`;
  const answers = `${count(batch.ok)} assessed, ${count(batch.not_assessable)} not assessable`;
  announce(`The batch ${how}: ${answers}, ${count(batch.failed)} not readable.`);
  if (batch.failed || batch.not_assessable) drawFailures(failures, id, batch, signal);
  await look(true);
}

function drawProgress(panel, batch, rates, cancel) {
  const figures = [
    ["images", batch.total ? `${count(batch.done)} of ${count(batch.total)}` : "being counted"],
    ["assessed", count(batch.ok)],
    ["not assessable", count(batch.not_assessable)],
    ["not readable", count(batch.failed)],
    ["throughput", rate(batch.images_per_second)],
    ended(batch) ? ["finished", when(batch.finished)] : ["left", duration(batch.eta_seconds)],
    ["model", batch.model ? modelText(batch.model) : "–"],
  ];
  const running = !ended(batch);
  const progress = running && h("div", { class: "bar-row" },
    h(
      "progress",
      { max: batch.total || 1, "aria-label": "Images scored", ...(batch.total ? { value: batch.done } : {}) },
    ),
    h("b", null, batch.total ? `${Math.floor((100 * batch.done) / batch.total)}\u00a0%` : "…"), sparkline(rates), cancel);
  const keep = document.activeElement === cancel;
  fill(panel, progress, h(
    "dl", { class: "figures" },
    figures.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))),
  ),
    batch.error && problem({ message: batch.error }, "The batch failed"));
  if (keep && running) cancel.focus();
}

/** Throughput over the time that this page has watched. */
function sparkline(rates) {
  const points = rates.slice(-60);
  if (points.length < 3) return null;
  const svg = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const top = Math.max(...points);
  const place = points.map(
    (value, i) => `${((100 * i) / (points.length - 1)).toFixed(1)},${(23 - (22 * value) / top).toFixed(1)}`
  );
  const picture = svg(
    "svg",
    { viewBox: "0 0 100 24", class: "spark", role: "img", "aria-label": `Throughput, up to ${rate(top)}` },
  );
  picture.append(svg("polyline", { points: place.join(" ") }));
  return picture;
}

function drawExports(node, batch, said) {
  const some = batch.state === "finished";
  if (node.dataset.for === String(some)) return;
  node.dataset.for = String(some);
  if (!some) return void fill(node);
  const formats = FORMATS.filter(([format]) => format !== "fhir" || batch.has_pathways);
  fill(
    node,
    h("span", { class: "src", id: "export-label" }, "Export"),
    h("ul", { class: "plain inline", "aria-labelledby": "export-label" }, formats.map(([format, ending, text]) => {
      const path = batchPath(batch.id, `/results?format=${format}`);
      const name = `${batch.id}.${ending}`;
      const onclick = async (event) => {
        if (!key.get()) return; // the browser streams it to disk by itself
        event.preventDefault();
        try {
          await save(path, name);
        } catch (error) {
          fill(said, problem(error, "Not exported"));
        }
      };
      return h("li", null, h("a", { class: "button", href: path, download: name, onclick }, text));
    })),
  );
}

async function drawFailures(node, id, batch, signal) {
  const content = h("div", { class: "scroll" });
  const box = h("details", { class: "failures" },
    h(
      "summary", null,
      `Without an answer: ${count(batch.not_assessable)} not assessable, ${count(batch.failed)} not readable`,
    ), content);
  box.addEventListener("toggle", async () => {
    if (!box.open || content.hasChildNodes()) return;
    try {
      const { failures } = await call(batchPath(id, "/failures"), { signal });
      fill(content, h("table", { class: "list" },
        h("caption", { class: "unseen" }, "Images without an answer"),
        h("thead", null, h("tr", null, ["image", "what", "why"].map((name) => h("th", { scope: "col" }, name)))),
        h(
          "tbody", null,
          failures.slice(0, 500).map(
            (one) => h(
              "tr", null,
              h("th", { scope: "row" }, one.image_id),
              h("td", null, one.status === "failed" ? "not readable" : label(one.status)),
              h("td", null, one.reason ?? "–"),
            )
          ),
        )),
        failures.length > 500 && h(
          "p", { class: "src" },
          `The first 500 of ${count(failures.length)}; the export has all.`,
        ));
    } catch (error) {
      if (!signal.aborted) fill(content, problem(error, "No list of failures"));
    }
  });
  fill(node, box);
}
