// New batch: drop or choose pictures, an archive and a table of patients, or name an address the server can read.

import { call, upload } from "./api.js";
import { announce, fill, h, problem } from "./dom.js";
import { link } from "./store.js";
import { percent, plural, size } from "./words.js";

const ARCHIVE = /\.(zip|tar|tar\.gz|tgz|tar\.zst|tzst)$/i;
const IMAGE = /\.(jpe?g|png|tiff?|bmp|webp|dcm)$/i;
const TABLE = /\.(csv|tsv|txt|json|jsonl|ndjson|parquet|pq)$/i;

/** What a file is for, by its name: `archive`, `image`, `patients`, or null. */
export function kindOf(name) {
  if (ARCHIVE.test(name)) return "archive";
  if (IMAGE.test(name)) return "image";
  return TABLE.test(name) ? "patients" : null;
}

export function intake() {
  const chosen = { archive: null, images: [], patients: null };
  const list = h("ul", { class: "plain chosen" });
  const outcome = h("div", null);
  const send = h("button", { type: "button", class: "primary", disabled: true, onclick: start }, "Score");
  const images = picker(
    "files",
    "Pictures or one archive",
    ".zip,.tar,.tgz,.gz,.zst,.tzst,.jpg,.jpeg,.png,.tif,.tiff,.bmp,.webp,.dcm",
  );
  const table = picker("patients", "Table of patients", ".csv,.tsv,.txt,.json,.jsonl,.ndjson,.parquet,.pq");

  const zone = h(
    "div",
    { class: "drop", ondragover: (event) => { event.preventDefault(); zone.classList.add("over"); },
      ondragleave: () => zone.classList.remove("over"), ondrop },
    h(
      "p", { class: "drop-text" },
      h("b", null, "Drop pictures, a folder or an archive here"),
      h("br"),
      "together with a table of patients, if there is one",
    ),
    h("div", { class: "pickers" }, images.node, table.node),
  );

  function picker(id, text, accept) {
    const input = h(
      "input",
      {
        type: "file",
        id: `pick-${id}`,
        class: "unseen",
        accept,
        multiple: id === "files",
        onchange: () => { take([...input.files]); input.value = ""; },
      },
    );
    return {
      node: h("span", { class: "picker" }, input, h("label", { class: "button", for: `pick-${id}` }, text, " …"))
    };
  }

  async function ondrop(event) {
    event.preventDefault();
    event.stopPropagation();
    zone.classList.remove("over");
    take(await dropped(event.dataTransfer));
  }

  function take(files) {
    const unknown = [];
    for (const file of files) {
      const kind = kindOf(file.name);
      if (kind === "archive") { chosen.archive = file; chosen.images = []; }
      else if (kind === "image") { chosen.images.push(file); chosen.archive = null; }
      else if (kind === "patients") chosen.patients = file;
      else unknown.push(file.name);
    }
    const some = unknown.slice(0, 3).join(", ") + (unknown.length > 3 ? ", …" : "");
    fill(outcome, unknown.length > 0 && problem({
      message: `${plural(unknown.length, "file")} left out: ${some}`,
      expected: "pictures (JPEG, PNG, DICOM …), an archive (zip, tar …) or a table (CSV, JSON, Parquet …)",
    }, "Not taken"));
    drawList();
    announce([...list.children].map((item) => item.firstChild.textContent).join(", ") || "Nothing is chosen.");
  }

  function drawList() {
    const bytes = chosen.images.reduce((sum, file) => sum + file.size, 0);
    fill(
      list,
      chosen.archive && item(
        `archive ${chosen.archive.name}, ${size(chosen.archive.size)}`,
        () => { chosen.archive = null; },
      ),
      chosen.images.length > 0 && item(
        `${plural(chosen.images.length, "picture")}, ${size(bytes)}`,
        () => { chosen.images = []; },
      ),
      chosen.patients && item(
        `patients ${chosen.patients.name}, ${size(chosen.patients.size)}`,
        () => { chosen.patients = null; },
      ),
    );
    send.disabled = !chosen.archive && !chosen.images.length;
  }

  function item(text, remove) {
    return h(
      "li", null,
      h("span", null, text),
      h(
        "button",
        {
          type: "button",
          class: "quiet",
          "aria-label": `Remove ${text}`,
          onclick: () => { remove(); drawList(); images.node.querySelector("input").focus(); },
        },
        "Remove",
      ),
    );
  }

  async function start() {
    const form = new FormData();
    if (chosen.archive) form.append("archive", chosen.archive, chosen.archive.name);
    for (const file of chosen.images) form.append("images", file, file.name);
    if (chosen.patients) form.append("patients", chosen.patients, chosen.patients.name);
    const bar = h("progress", { max: 1, value: 0, "aria-label": "Upload" });
    const text = h("span", null, "Sending");
    const stop = new AbortController();
    fill(
      outcome,
      h(
        "div", { class: "sending" },
        text,
        bar,
        h("button", { type: "button", class: "quiet", onclick: () => stop.abort() }, "Stop"),
      ),
    );
    send.disabled = true;
    try {
      const sent = (share) => {
        bar.value = share;
        text.textContent = share < 1 ? `Sending ${percent(share)}` : "The server checks it";
      };
      open(await upload("v1/batches", form, sent, stop.signal));
    } catch (error) {
      fill(
        outcome,
        error.name === "AbortError" ? h(
          "p", { role: "status" },
          "Stopped; nothing was scored.",
        ) : problem(error, "Not scored"),
      );
      send.disabled = false;
    }
  }

  function open(batch) {
    announce("The batch is taken.");
    location.hash = link.batch(batch.id);
  }

  return h("section", { class: "panel intake", "aria-labelledby": "intake-title" },
    h(
      "h2", { id: "intake-title" },
      "New batch",
    ), zone, list, h("p", { class: "actions" }, send), outcome, byAddress(open));
}

function byAddress(open) {
  const source = h(
    "input",
    { id: "source", type: "text", required: true, placeholder: "s3://bucket/prefix/", spellcheck: "false" },
  );
  const patients = h("input", { id: "source-patients", type: "text", spellcheck: "false" });
  const outcome = h("div", null);
  const onsubmit = async (event) => {
    event.preventDefault();
    try {
      open(
        await call(
          "v1/batches",
          { method: "POST", json: { source: source.value.trim(), patients: patients.value.trim() || null } },
        )
      );
    } catch (error) {
      fill(outcome, problem(error, "Not scored"));
    }
  };
  return h("details", null, h("summary", null, "Or name an address that the server can read"),
    h("form", { class: "stack", onsubmit },
      h("p", null, h("label", { for: "source" }, "Pictures (folder, archive, CSV of addresses or s3://)"), source),
      h("p", null, h("label", { for: "source-patients" }, "Table of patients, if there is one"), patients),
      h("p", { class: "actions" }, h("button", null, "Score this address")), outcome));
}

/** Files of a drop, with those inside dropped folders. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((one) => one.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  return (await Promise.all(entries.map(filesOf))).flat();
}

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const reader = entry.createReader();
  const found = [];
  for (;;) { // a reader gives a hundred entries at a time
    const part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!part.length) break;
    found.push(...part);
  }
  const files = (await Promise.all(found.map(filesOf))).flat();
  return files.filter((file) => !file.name.startsWith("."));
}
