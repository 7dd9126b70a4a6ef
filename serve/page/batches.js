// The dashboard: what runs, how fast, what failed; and the way in for a new batch.

import { call, ended, pause } from "./api.js";
import { bar, fill, h, problem } from "./dom.js";
import { intake } from "./intake.js";
import { bindKeys } from "./keys.js";
import { link } from "./store.js";
import { count, duration, plural, rate, STATE_TEXT, when } from "./words.js";

export async function showBatches(place, { signal, shown }) {
  const tiles = h("dl", { class: "tiles" });
  const table = h("div", null);
  const dashboard = h(
    "section", { "aria-labelledby": "dash-title" },
    h("h2", { id: "dash-title" }, "All batches"),
    tiles,
    table,
  );
  place.append(h("h1", { tabindex: "-1" }, "Batches"), h("div", { class: "dashboard" }, intake(), dashboard));
  const step = (by) => () => {
    const links = [...table.querySelectorAll("a.row-link")];
    links[Math.max(0, Math.min(links.length - 1, links.indexOf(document.activeElement) + by))]?.focus();
  };
  bindKeys({
    j: { does: "next batch of the table; Enter opens it", run: step(1) },
    k: { does: "batch before", run: step(-1) },
    n: { does: "new batch: choose pictures or an archive", run: () => document.getElementById("pick-files")?.focus() },
  });
  let running = draw((await call("v1/batches", { signal })).batches, tiles, table);
  shown();
  while (!signal.aborted) {
    await pause(running ? 2000 : 10_000, signal);
    if (signal.aborted) return;
    if (document.hidden) continue;
    try {
      const { batches } = await call("v1/batches", { signal });
      running = draw(batches, tiles, table);
    } catch (error) {
      if (signal.aborted) return;
      fill(tiles);
      fill(table, problem(error, "The list is not up to date"));
    }
  }
}

function draw(batches, tiles, table) {
  const running = batches.filter((batch) => !ended(batch));
  const sum = (name, of = batches) => of.reduce((total, batch) => total + (batch[name] ?? 0), 0);
  fill(
    tiles,
    tile("running now", count(running.length)),
    tile("throughput now", running.length ? rate(sum("images_per_second", running)) : "–"),
    tile("images scored", count(sum("done"))),
    tile("not assessable", count(sum("not_assessable"))),
    tile("not readable", count(sum("failed")), sum("failed") > 0),
  );
  const focused = table.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  fill(
    table,
    batches.length ? tableOf(batches) : h("p", { class: "empty" }, "No batch yet. Drop some pictures to start one."),
  );
  if (focused) [...table.querySelectorAll("a")].find(
    (one) => one.getAttribute("href") === focused
  )?.focus({ preventScroll: true });
  return running.length > 0;
}

const tile = (name, value, warm) => h(
  "div", { class: warm ? "tile warm" : "tile" },
  h("dt", null, name),
  h("dd", null, value),
);

function tableOf(batches) {
  const head = ["batch", "state", "progress", "throughput", "not assessable", "not readable", "started"];
  const numbers = new Set(["throughput", "not assessable", "not readable"]);
  return h(
    "table",
    { class: "list batches" },
    h("caption", { class: "unseen" }, "Batches, newest first"),
    h(
      "thead", null,
      h("tr", null, head.map((name) => h("th", { scope: "col", class: numbers.has(name) ? "num" : "" }, name))),
    ),
    h("tbody", null, batches.map(row)),
  );
}

function row(batch) {
  const share = batch.total ? batch.done / batch.total : 0;
  return h(
    "tr",
    null,
    h("th", { scope: "row" }, h("a", { class: "row-link", href: link.batch(batch.id) }, batch.name || batch.id),
      batch.has_pathways && h("span", { class: "tag" }, "pathways")),
    h("td", null, stateChip(batch)),
    h("td", {
      class: "progress-cell"
    }, bar(share), h("span", null, batch.total ? `${count(batch.done)} of ${plural(batch.total, "image")}` : "–",
      batch.eta_seconds > 0 && !ended(batch) ? `, ${duration(batch.eta_seconds)} left` : "")),
    h("td", { class: "num", "data-label": "throughput" }, rate(batch.images_per_second)),
    h("td", { class: "num", "data-label": "not assessable" }, count(batch.not_assessable)),
    h("td", { class: batch.failed ? "num warm-text" : "num", "data-label": "not readable" }, count(batch.failed)),
    h("td", { "data-label": "started" }, when(batch.created)),
  );
}

/** The state of a batch, in words and with a mark. */
export function stateChip(batch) {
  const marks = { queued: "○", running: "◐", finished: "●", failed: "✕", cancelled: "■" };
  return h(
    "span", { class: `state ${batch.state}` },
    h("span", { "aria-hidden": "true" }, marks[batch.state] ?? "", " "),
    STATE_TEXT[batch.state] ?? batch.state,
  );
}
