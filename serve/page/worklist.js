// The work list of a batch: most urgent first, with filters and search.

import { bar, fill, h } from "./dom.js";
import { bindKeys } from "./keys.js";
import { diagnosis, filtered, link } from "./store.js";
import { count, percent, URGENCIES, URGENCY_SHORT, URGENCY_TEXT } from "./words.js";

const HEAD = ["urgency", "lesion", "most probable", "malignant", "cannot be ruled out", "mark", "signed"];
const PAGE = 200; // rows put on the page at once: more makes typing in the search slow

export function worklist(id, list, { running }) {
  const { rows, filter } = list;
  let shown = PAGE;
  const body = h("tbody", null);
  const found = h("p", { class: "src found", role: "status" });
  const more = h("button", { type: "button", onclick: () => { shown += PAGE; draw(); } });

  function draw() {
    const passed = filtered(list);
    fill(body, passed.slice(0, shown).map((row) => rowOf(id, row)));
    const of = passed.length === rows.length ? "" : `${count(passed.length)} of `;
    found.textContent = `${of}${count(rows.length)} lesions`;
    more.hidden = passed.length <= shown;
    more.textContent = `Show ${count(Math.min(PAGE, passed.length - shown))} more`;
  }

  function step(by) {
    const links = [...body.querySelectorAll("a.row-link")];
    let at = links.indexOf(document.activeElement);
    if (at < 0) at = links.findIndex((one) => one.textContent === list.last); // go on where one came back from
    links[at < 0 ? 0 : Math.max(0, Math.min(links.length - 1, at + by))]?.focus();
  }

  const search = h(
    "input",
    {
      type: "search",
      id: "search",
      value: filter.text,
      placeholder: "lesion, patient, diagnosis",
      oninput: () => { filter.text = search.value; draw(); },
    },
  );
  const numbers = Object.fromEntries(URGENCIES.map((u) => [u, rows.filter((row) => row.urgency === u).length]));
  const anyUrgency = URGENCIES.some((u) => numbers[u]);
  const filters = h(
    "div",
    { class: "filters", role: "search", "aria-label": "Filter the work list" },
    h("p", { class: "search" }, h("label", { for: "search" }, "Search"), search),
    anyUrgency && h("fieldset", { class: "pills" }, h("legend", null, "Urgency"), URGENCIES.map((u) => pill(`f-${u}`, [
      h("b", null, u),
      ` ${count(numbers[u])}`,
    ], filter.urgency.includes(u), (checked) => {
      filter.urgency = checked ? [...filter.urgency, u] : filter.urgency.filter((one) => one !== u);
      draw();
    }, URGENCY_TEXT[u], u))),
    h("fieldset", { class: "pills" }, h("legend", null, "Only"),
      pill(
        "f-flagged",
        `flagged ${count(rows.filter((row) => row.flagged).length)}`,
        filter.flagged,
        (checked) => { filter.flagged = checked; draw(); },
      ),
      pill(
        "f-unsigned",
        `unsigned ${count(rows.filter((row) => !row.signed).length)}`,
        filter.unsigned,
        (checked) => { filter.unsigned = checked; draw(); },
      )),
  );
  bindKeys({
    j: { does: "next lesion of the list; Enter opens it", run: () => step(1) },
    k: { does: "lesion before", run: () => step(-1) },
    "/": { does: "search", run: () => search.focus() },
    u: { does: "back to all batches", run: () => { location.hash = "#/"; } },
  });
  draw();
  if (!rows.length) {
    const text = running ? "The work list appears when the first images are scored." : "No lesion.";
    return [h("h2", { id: "worklist-title" }, "Work list"), h("p", { class: "empty" }, text)];
  }
  return [
    h(
      "div", { class: "worklist-head" },
      h("h2", { id: "worklist-title" }, "Work list", running && h("small", null, "grows while the batch runs")),
      found,
      h("p", { class: "src legend" }, h("span", { class: "warm-text" }, "▲"), " malignant class"),
    ),
    filters,
    h("table", { class: "list worklist" },
      h("caption", { class: "unseen" }, "Lesions, most urgent first"),
      h(
        "thead", null,
        h(
          "tr", null,
          HEAD.map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      body),
    h("p", { class: "actions" }, more),
    h(
      "p", { class: "src" },
      "Malignant: estimated from pictures; does not rule out cancer. ",
      "Flagged: suspicious by the model's safety policy, also where the most probable class is harmless.",
    ),
  ];
}

function pill(id, content, checked, change, title, urgency) {
  const box = h("input", { type: "checkbox", id, checked, onchange: () => change(box.checked) });
  return h("span", { class: urgency ? `pill ${urgency}` : "pill" }, box, h("label", { for: id, title }, content));
}

/** Urgency with its word; colour only helps. */
export function urgencyChip(urgency) {
  if (!urgency) return h("span", { class: "urgency-chip none" }, "no pathway");
  return h(
    "span", { class: `urgency-chip ${urgency}`, title: URGENCY_TEXT[urgency] },
    h("b", null, urgency),
    ` ${URGENCY_SHORT[urgency]}`,
  );
}

/** The mark of a malignant class: a sign for the eye, the word for a screen reader. */
export function malignantMark() {
  return h(
    "span", { class: "warm-text", title: "malignant class" },
    h("span", { "aria-hidden": "true" }, "\u2009▲"),
    h("span", { class: "unseen" }, " malignant"),
  );
}

/** Codes of the conformal set, the malignant marked. */
export function setChips(codes) {
  if (!codes?.length) return "–";
  return h("span", { class: "set" }, codes.map((code) => {
    const { name, malignant } = diagnosis(code);
    return h(
      "span",
      { class: malignant ? "code malignant" : "code", title: malignant ? `${name}, malignant` : name },
      code,
      malignant && malignantMark(),
    );
  }));
}

export function signedChip(decision) {
  const marks = { accepted: "✓", edited: "✎", rejected: "✕" };
  if (!decision) return h("span", { class: "src" }, "unsigned");
  return h(
    "span", { class: `signed ${decision}` },
    h("span", { "aria-hidden": "true" }, marks[decision], " "),
    decision,
  );
}

function rowOf(id, row) {
  const assessed = row.status === "ok";
  const { name, malignant } = row.prediction && assessed ? diagnosis(row.prediction) : {};
  return h(
    "tr",
    { class: row.signed ? "done" : "" },
    h("td", { class: "c-urgency" }, urgencyChip(row.urgency)),
    h("th", { scope: "row", class: "c-lesion" }, h(
      "a", { class: "row-link", href: link.lesion(id, row.lesion_id) },
      row.lesion_id,
    ),
      row.patient_id && h("span", { class: "src" }, row.patient_id)),
    h(
      "td", { class: "c-dx" },
      !assessed ? h(
        "i", null,
        row.status === "failed" ? "not readable" : "not assessable",
      ) : name ? [name, malignant && malignantMark()] : "–",
    ),
    h(
      "td", { class: "c-p" },
      assessed && row.p_malignant !== null ? [
        bar(row.p_malignant, "warm"),
        h("span", { class: "num" }, percent(row.p_malignant)),
      ] : "–",
    ),
    h("td", { class: "c-set" }, assessed ? setChips(row.conformal_set) : "–"),
    h(
      "td", { class: "c-flag" },
      row.flagged && h("span", { class: "flag" }, h("span", { "aria-hidden": "true" }, "⚑ "), "flagged"),
    ),
    h("td", { class: "c-signed" }, signedChip(row.signed)),
  );
}
