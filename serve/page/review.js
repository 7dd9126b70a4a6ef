// Sign-off: a named clinician accepts, edits or rejects, with a reason.

import { call } from "./api.js";
import { announce, fill, h, problem } from "./dom.js";
import { when } from "./words.js";

const BY = "dermaflow.by"; // of sessionStorage: the name is asked once a session
const DECISIONS = [
  ["accepted", "Accept", "a", "as it stands"],
  ["edited", "Edit", "e", "with changes, which the reason says"],
  ["rejected", "Reject", "r", "not to be followed"],
];

/**
 * The bar to sign with. `signed(pathway)` is called when a decision is kept.
 * Gives `node`, `update(pathway)` and `choose(decision)`.
 */
export function reviewBar(batchId, lesionId, signed) {
  let pathway = null;
  const status = h("div", { class: "sign-status" });
  const outcome = h("div", { class: "sign-outcome" });
  const boxes = DECISIONS.map(
    ([value]) => h("input", { type: "radio", name: "decision", id: `decision-${value}`, value, onchange: drawReason })
  );
  const by = h(
    "input",
    {
      id: "by",
      type: "text",
      autocomplete: "name",
      maxlength: "120",
      "aria-describedby": "by-wrong",
      value: sessionStorage.getItem(BY) ?? "",
    },
  );
  const reason = h("textarea", { id: "reason", rows: "1", maxlength: "2000", "aria-describedby": "reason-wrong" });
  const reasonLabel = h("label", { for: "reason" });
  const byWrong = h("span", { id: "by-wrong", class: "wrong" });
  const reasonWrong = h("span", { id: "reason-wrong", class: "wrong" });
  const choiceWrong = h("span", { id: "choice-wrong", class: "wrong" });
  const send = h("button", { class: "primary" }, "Sign");
  const form = h(
    "form",
    { class: "sign-form", novalidate: true, onsubmit },
    h("fieldset", { class: "pills", "aria-describedby": "choice-wrong" }, h("legend", null, "Decision"),
      boxes.map(
        (box, i) => h(
          "span", { class: "pill" },
          box,
          h("label", { for: box.id, title: DECISIONS[i][3] }, DECISIONS[i][1]),
        )
      ), choiceWrong),
    h("p", { class: "sign-reason" }, reasonLabel, reason, reasonWrong),
    h("p", { class: "sign-by" }, h("label", { for: "by" }, "Name of the clinician"), by, byWrong),
    send,
  );
  const node = h("section", { class: "sign", "aria-label": "Sign-off" }, status, form, outcome);

  const chosen = () => boxes.find((box) => box.checked)?.value;
  const needsReason = () => (chosen() !== undefined && chosen() !== "accepted") || Boolean(pathway?.sign_off);

  function drawReason() {
    reasonLabel.textContent = needsReason() ? "Reason (required)" : "Reason (required unless accepted)";
    reason.required = needsReason();
  }

  function check() {
    const wrong = [
      [boxes[0], choiceWrong, chosen() ? "" : "Choose accept, edit or reject."],
      [reason, reasonWrong, needsReason() && !reason.value.trim() ? "Say why: a reason is required." : ""],
      [by, byWrong, (by.value.match(/\p{L}/gu) ?? []).length < 2 ? "Give the name of the person who decides." : ""],
    ];
    for (const [input, place, text] of wrong) {
      place.textContent = text;
      if (text) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
    }
    const [first] = wrong.filter(([, , text]) => text);
    if (!first) return true;
    first[0].focus();
    announce(first[2]);
    return false;
  }

  async function onsubmit(event) {
    event.preventDefault();
    fill(outcome);
    if (!check()) return;
    send.disabled = true;
    try {
      const decision = chosen();
      const told = await call(
        "v1/reviews",
        {
          method: "POST",
          json: {
            batch_id: batchId,
            lesion_id: lesionId,
            by: by.value.trim(),
            decision,
            reason: reason.value.trim() || null,
          },
        },
      );
      sessionStorage.setItem(BY, by.value.trim());
      for (const box of boxes) box.checked = false;
      reason.value = "";
      update(told.pathway);
      announce(`Signed: ${decision}.`);
      signed(told.pathway);
    } catch (error) {
      fill(outcome, problem(error, "Not signed"));
    } finally {
      send.disabled = false;
    }
  }

  function update(now) {
    pathway = now;
    form.hidden = !pathway;
    node.classList.toggle("is-signed", Boolean(pathway?.sign_off));
    if (!pathway) fill(status, h("p", null, "There is no pathway to sign yet: fill in what is known of the patient."));
    else if (pathway.sign_off) {
      const { by: name, at, decision, reason: why } = pathway.sign_off;
      fill(
        status,
        h(
          "p", null,
          h("b", { class: decision }, `${decision[0].toUpperCase()}${decision.slice(1)} by `, name),
          h("span", { class: "src" }, ` ${when(at)}`),
          why && ` · ${why}`,
          h("span", { class: "src" }, " An amendment needs a reason; this one stays in the log."),
        ),
      );
    } else fill(
      status,
      h(
        "p", null,
        h("b", { class: "preliminary" }, "PRELIMINARY"),
        " Nothing here may be ordered, planned or told to the patient before a clinician has signed.",
      ),
    );
    drawReason();
  }

  /** Start a decision from the keyboard. */
  function choose(decision) {
    if (form.hidden) return;
    const box = boxes.find((one) => one.value === decision);
    box.checked = true;
    drawReason();
    const next = needsReason() && !reason.value.trim() ? reason : by.value.trim() ? send : by;
    next.focus();
  }

  return { node, update, choose };
}

export const decisionKeys = DECISIONS;
