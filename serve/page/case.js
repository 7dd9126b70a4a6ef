// What is known of patient and lesion, as inputs. Each answer is handed on at once.

import { fill, freshId, h, problem } from "./dom.js";
import { label } from "./words.js";

const ASKED = 6; // questions shown; the rest opens on demand

/**
 * The inputs of a case.
 * `change(fact, value)` is called for every answer. Gives `node`, `update(case, missing)`, `ask(fact)` and `refuse(fact, error)`.
 */
export function caseForm(fields, change) {
  const controls = new Map(); // fact: its controls, of the questions and of the full list
  const questions = new Map(); // fact: its item among the questions; they stay in place while the view is open
  const title = h("h2", { id: "ask-title" }, "Unknown, and would matter");
  const number = h("small", null);
  title.append(number);
  const first = h("div", { class: "questions" });
  const rest = h("div", { class: "questions" });
  const moreTitle = h("summary", null);
  const more = h("details", null, moreTitle, rest);
  const none = h("p", { class: "src" }, "Nothing that is unknown would matter.");
  const lists = ["patient", "lesion"].map((whose) => {
    const own = [...fields].filter(([name]) => name.startsWith(`${whose}.`));
    const known = h("small", null);
    const box = h(
      "details", { class: "all-fields" },
      h(
        "summary", null,
        whose === "patient" ? "Everything known of the patient" : "Everything known of the lesion",
        known,
      ),
    );
    let filled = false;
    const open = () => {
      if (filled) return;
      filled = true;
      box.append(
        h(
          "div", { class: "questions" },
          own.map(
            ([name, field]) => h("div", { class: "question" }, make(name, field, label(name), field.description))
          ),
        )
      );
      refresh();
    };
    box.addEventListener("toggle", open);
    return { whose, own, known, box, open };
  });
  let current = { patient: {}, lesion: {} };

  function make(name, field, text, hint) {
    const one = control(field, text, hint, (value) => change(name, value));
    controls.set(name, [...(controls.get(name) ?? []), one]);
    return one.node;
  }

  function valueOf(name) {
    const [whose, field] = name.split(".");
    return current[whose]?.[field];
  }

  function refresh() {
    for (const [name, all] of controls) for (const one of all) one.set(valueOf(name));
    for (const list of lists) {
      const known = list.own.filter(([name]) => isKnown(valueOf(name))).length;
      list.known.textContent = `${known} of ${list.own.length} known`;
    }
  }

  function update(now, missing) {
    current = now;
    for (const item of missing) {
      const field = fields.get(item.fact);
      if (!field || questions.has(item.fact)) continue;
      const node = h(
        "div", { class: "question" },
        make(item.fact, field, item.question, null),
        h("span", { class: "src cite" }, `[${item.rules.join(", ")}]`),
      );
      questions.set(item.fact, node);
      (first.childElementCount < ASKED ? first : rest).append(node);
    }
    const open = new Set(missing.map((item) => item.fact));
    for (const [name, node] of questions) {
      node.classList.toggle("answered", isKnown(valueOf(name)));
      node.classList.toggle("moot", !open.has(name) && !isKnown(valueOf(name)));
    }
    number.textContent = missing.length ? `${missing.length} open` : "";
    none.hidden = questions.size > 0;
    more.hidden = rest.childElementCount === 0;
    moreTitle.textContent = `and ${rest.childElementCount} more`;
    refresh();
  }

  /** Lead to the input of a fact. */
  function ask(name) {
    let node = questions.get(name);
    if (node && rest.contains(node)) more.open = true;
    if (!node) {
      const list = lists.find((one) => name.startsWith(`${one.whose}.`));
      list.box.open = true;
      list.open();
      node = controls.get(name)?.at(-1)?.node;
    }
    node?.scrollIntoView({ block: "center" });
    node?.querySelector("input:checked, input, select")?.focus({ preventScroll: true });
  }

  function refuse(name, error) {
    for (const one of controls.get(name) ?? []) one.refuse(error);
  }

  const node = h(
    "section", { class: "case", "aria-labelledby": "ask-title" },
    title,
    none,
    first,
    more,
    lists.map((list) => list.box),
  );
  return { node, update, ask, refuse };
}

function isKnown(value) {
  if (Array.isArray(value)) return value.length > 0 && !value.includes("unknown");
  return value !== undefined && value !== null && value !== "unknown";
}

/** One input with its label. Gives `node`, `set(value)` and `refuse(error)`. */
function control(field, text, hint, change) {
  const id = freshId("field");
  const wrong = h("div", { id: `${id}-wrong` });
  const kind = field.type === "choice" && field.choices.every(
    (word) => ["yes", "no", "unknown"].includes(word)
  ) ? "yesno" : field.type;
  const made = { yesno: yesNo, choice, choices, number }[kind](
    field,
    id,
    text,
    hint,
    (value) => { fill(wrong); change(value); },
  );
  made.node.append(wrong);
  return { ...made, refuse: (error) => fill(wrong, problem(error, "Not taken")) };
}

const words = (word) => word.replaceAll("_", " ");
const hintNode = (hint) => hint && h("span", { class: "src" }, " ", hint);

function yesNo(field, id, text, hint, change) {
  const boxes = ["yes", "no", "unknown"].map(
    (word) => h("input", { type: "radio", name: id, id: `${id}-${word}`, value: word, onchange: () => change(word) })
  );
  const node = h("fieldset", { class: "yesno" }, h("legend", null, text, hintNode(hint)),
    h(
      "span", { class: "segments" },
      boxes.map(
        (box) => [
          box,
          h(
            "label", { for: box.id },
            box.value === "unknown" ? "?" : box.value,
            box.value === "unknown" && h("span", { class: "unseen" }, " unknown"),
          ),
        ]
      ),
    ));
  return { node, set: (value) => { for (const box of boxes) box.checked = box.value === (value ?? "unknown"); } };
}

function choice(field, id, text, hint, change) {
  const input = h(
    "select", { id, onchange: () => change(input.value) },
    field.choices.map((word) => h("option", { value: word }, words(word))),
  );
  return {
    node: h("div", { class: "field" }, h("label", { for: id }, text, hintNode(hint)), input),
    set: (value) => { input.value = value ?? "unknown"; },
  };
}

function number(field, id, text, hint, change) {
  const unit = field.unit && !text.includes(field.unit) ? ` (${field.unit})` : "";
  const onchange = () => {
    if (!input.validity.badInput) change(input.value === "" ? null : Number(input.value));
  };
  const input = h("input", {
    type: "number", id, step: "any", min: field.min, max: field.max, placeholder: "unknown",
    "aria-describedby": `${id}-wrong`, onchange,
  });
  return {
    node: h("div", { class: "field" }, h("label", { for: id }, text, unit, hintNode(hint)), input),
    set: (value) => { if (document.activeElement !== input || input.value === "") input.value = value ?? ""; },
  };
}

function choices(field, id, text, hint, change) {
  const alone = (box) => ["none", "unknown"].includes(box.value); // they exclude every other answer
  const onchange = ({ target }) => {
    for (const box of boxes) {
      if (target.checked && box !== target && (alone(target) || alone(box))) box.checked = false;
    }
    const ticked = boxes.filter((box) => box.checked).map((box) => box.value);
    change(ticked.length ? ticked : ["unknown"]);
  };
  const boxes = field.choices.map(
    (word) => h("input", { type: "checkbox", id: `${id}-${word}`, value: word, onchange }),
  );
  const node = h(
    "fieldset", { class: "several" },
    h("legend", null, text, hintNode(hint)),
    boxes.map((box) => h("span", null, box, " ", h("label", { for: box.id }, words(box.value)))),
  );
  return {
    node,
    set: (value) => { for (const box of boxes) box.checked = (value ?? ["unknown"]).includes(box.value); },
  };
}
