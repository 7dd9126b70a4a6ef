// One lesion: pictures, pathway, open questions, sign-off, and the way to the next one.

import { batchPath, call } from "./api.js";
import { caseForm } from "./case.js";
import { compare } from "./changes.js";
import { announce, fill, h, problem } from "./dom.js";
import { pictures } from "./finding.js";
import { bindKeys } from "./keys.js";
import { pathwayView } from "./pathway.js";
import { decisionKeys, reviewBar } from "./review.js";
import { filtered, link, loadFields, loadList, touch } from "./store.js";
import { count, fact } from "./words.js";

export async function showLesion(place, { signal }, id, lesionId) {
  const path = batchPath(id, `/lesions/${encodeURIComponent(lesionId)}`);
  const [told, fields, list] = await Promise.all([
    call(path, { signal }),
    loadFields(),
    loadList(id, { signal }).catch(() => null), // a lesion can be read without its neighbours in the list
  ]);
  if (list) list.last = lesionId;
  let pathway = told.pathway;
  const known = {
    patient: told.patient ?? { patient_id: `unknown-${lesionId}` },
    lesion: told.lesion ?? { lesion_id: lesionId },
  };

  const person = h("p", { class: "src person" });
  const change = h("div", { class: "changes", role: "status" });
  const plan = h("div", { class: "pathway" });
  const look = pictures(id, told.findings, pathway, signal);
  const form = caseForm(fields, answer);
  const sign = reviewBar(id, lesionId, (signed) => { pathway = signed; touch(id, signed); next.hidden = !unsigned(); });
  const walk = walking(list, id, lesionId);
  const unsigned = () => walk.rows.find((row) => !row.signed && row.lesion_id !== lesionId);
  const next = h(
    "button",
    { type: "button", hidden: true, onclick: () => { location.hash = link.lesion(id, unsigned().lesion_id); } },
    "Next unsigned lesion",
  );
  sign.node.append(next);

  place.append(
    h(
      "p", { class: "crumb" },
      h("a", { href: "#/" }, "Batches"),
      " / ",
      h("a", { href: link.batch(id) }, "Work list"),
      walk.node,
    ),
    h("div", { class: "title-row" }, h("h1", { tabindex: "-1" }, "Lesion ", lesionId), person),
    h("div", { class: "lesion" },
      h("section", { class: "panel col-look", "aria-label": "Pictures" }, look.node),
      h(
        "section", { class: "panel col-plan", "aria-labelledby": "plan-title" },
        h("h2", { id: "plan-title" }, "Pathway"),
        change,
        plan,
      ),
      h("div", { class: "panel col-case" }, form.node)),
    sign.node,
  );
  draw(new Set());

  bindKeys({
    j: { does: "next lesion", run: () => walk.go(1) },
    k: { does: "lesion before", run: () => walk.go(-1) },
    h: { does: "heat map on or off", run: look.toggleHeat },
    q: { does: "first open question", run: () => pathway?.missing[0] && form.ask(pathway.missing[0].fact) },
    ...Object.fromEntries(
      decisionKeys.map(
        ([value, name, letter]) => [
          letter,
          { does: `${name.toLowerCase()} this pathway`, run: () => sign.choose(value) },
        ]
      )
    ),
    u: { does: "back to the work list", run: () => { location.hash = link.batch(id); } },
  });

  function draw(marks) {
    fill(plan, pathway ? pathwayView(pathway, marks, form.ask) : noPathway());
    form.update(known, pathway?.missing ?? []);
    look.update(pathway);
    sign.update(pathway);
    const { age, sex } = known.patient;
    const site = known.lesion.site;
    const facts = [
      age !== undefined && age !== null && `${fact(age)} years`,
      sex && sex !== "unknown" && sex,
      site && site !== "unknown" && site,
    ];
    fill(
      person,
      "Patient ",
      h("b", null, known.patient.patient_id),
      facts.filter(Boolean).map((text) => ` · ${fact(text)}`),
    );
  }

  // answers wait for each other, so that an older pathway never replaces a newer one
  let queue = Promise.resolve();
  function answer(name, value) {
    const [whose, field] = name.split(".");
    queue = queue.then(() => send(name, whose, field, value));
  }

  async function send(name, whose, field, value) {
    const wanted = { ...known, [whose]: { ...known[whose], [field]: value } };
    try {
      const now = await call(`${path}/case`, { method: "PUT", json: wanted });
      const { marks, lines } = compare(pathway, now.pathway);
      Object.assign(known, { patient: now.patient ?? wanted.patient, lesion: now.lesion ?? wanted.lesion });
      pathway = now.pathway;
      if (pathway) touch(id, pathway);
      if (signal.aborted) return;
      draw(marks);
      fill(
        change,
        h(
          "p", null,
          h("b", null, lines.length ? "Changed" : "Nothing changed"),
          ` by ${name.split(".")[1].replaceAll("_", " ")}: ${fact(value)}`,
        ),
        lines.length > 0 && h("ul", null, lines.map((line) => h("li", null, line))),
      );
    } catch (error) {
      if (signal.aborted) return;
      form.update(known, pathway?.missing ?? []); // the input shows again what the server holds
      form.refuse(name, error);
    }
  }
}

function noPathway() {
  return [
    h(
      "p", null,
      h("b", null, "No pathway yet."),
      " Nothing is known of the patient: the batch came without a table, or without this lesion.",
    ),
    h("p", null, "Fill in what you know; the first answer makes a pathway, and unknown never counts as no."),
  ];
}

/** Lesion before and after, in the order of the filtered list. */
function walking(list, id, lesionId) {
  let rows = list ? filtered(list) : [];
  if (list && !rows.some(
    (row) => row.lesion_id === lesionId
  )) rows = list.rows; // it fell out of the filter: signed, for instance
  const at = rows.findIndex((row) => row.lesion_id === lesionId);
  const step = (by) => (at < 0 ? undefined : rows[at + by]);
  const go = (by) => {
    const row = step(by);
    if (row) location.hash = link.lesion(id, row.lesion_id);
    else announce(by > 0 ? "This is the last lesion." : "This is the first lesion.");
  };
  const arrow = (by, text) => {
    const row = step(by);
    return row ? h(
      "a", { class: "button", href: link.lesion(id, row.lesion_id) },
      text,
    ) : h("span", { class: "button off" }, text);
  };
  const node = at >= 0 && h(
    "nav", { class: "walk", "aria-label": "Lesions" },
    arrow(-1, "‹ Previous"),
    h("span", { class: "src" }, `${count(at + 1)} of ${count(rows.length)}`),
    arrow(1, "Next ›"),
  );
  return { node, go, rows };
}
