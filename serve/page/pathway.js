// The pathway of one lesion, in the order in which a clinician reads it.

import { h } from "./dom.js";
import { fact, label, OPTION_STATUS, plural, TEXT_TITLES, URGENCY_TEXT, VERIFICATION } from "./words.js";

const STATUS_MARK = { available: "✓", caution: "!", locked: "?", blocked: "✕" };

const REASONS = 3; // for the urgency, shown at once; the rest opens on demand

/** Blocked because the case is too urgent for it, not because it would harm. */
const overtaken = (option) => option.status === "blocked" && ["referral", "reassurance"].includes(option.group);

/**
 * The pathway on the page.
 * `changed` holds what the last input changed: `urgency`, `option:ID`, `notice:RULE`. `ask(fact)` leads to its question.
 */
export function pathwayView(pathway, changed, ask) {
  const said = new Set();
  const reasons = why(pathway);
  for (const line of reasons) said.add(line.rule);
  const notices = pathway.notices.filter((line) => !said.has(line.rule));
  for (const line of notices) said.add(line.rule);
  const open = pathway.options.filter((option) => option.status !== "blocked");
  const first = open.find((option) => option.status !== "locked");
  const blocked = pathway.options.filter((option) => option.status === "blocked");
  return [
    h("div", { class: `urgency ${pathway.urgency}` },
      h("b", { class: "level" }, pathway.urgency),
      h("div", null,
        h("p", null, h("strong", null, URGENCY_TEXT[pathway.urgency]), changed.has("urgency") && tagChanged()),
        first && h("p", null, "First to consider: ", h("b", null, first.title)),
        sentences(reasons.slice(0, REASONS)),
        reasons.length > REASONS && h("details", null,
          h("summary", null, plural(reasons.length - REASONS, "more reason")), sentences(reasons.slice(REASONS))),
        !reasons.length && h("p", { class: "src" }, `from rules ${pathway.urgency_rules.join(", ") || "–"}`))),
    notices.length > 0 && [h("h3", null, "Read first"), h("ul", { class: "plain notices" }, notices.map((line) =>
      h("li", null, line.text, " ", cite(line), changed.has(`notice:${line.rule}`) && tagChanged())))],
    h("h3", null, "Options, in the order to consider"),
    open.length === 0 && h("p", null, "None is offered."),
    h("ol", { class: "options" }, open.map((option, i) => optionView(option, open[i - 1], said, changed, ask))),
    blocked.length > 0 && [
      h("h3", null, `Blocked (${blocked.length})`),
      h("ul", { class: "plain blocked-options" }, grouped(blocked).map((group) => blockedView(group, changed))),
    ],
    pathway.follow_up.length > 0 && [
      h("h3", null, "Follow-up"),
      sentences(pathway.follow_up),
    ],
    Object.keys(pathway.patient_texts).length > 0 && [
      h("h3", null, "Words for the shared decision", h("small", null, "a draft: edit before use")),
      Object.entries(pathway.patient_texts).map(
        ([name, text]) => h(
          "blockquote", null,
          h("p", null, h("b", null, TEXT_TITLES[name] ?? name), " ", h("span", { class: "src" }, `[${name}]`)),
          h("p", null, text),
        )
      ),
    ],
    h("details", { class: "trace" },
      h("summary", null, `Trace: ${plural(pathway.trace.length, "rule")} that held, with the facts`),
      h(
        "dl", null,
        pathway.trace.map(
          (fired) => [
            h("dt", null, fired.rule),
            h(
              "dd", null,
              Object.entries(fired.facts).map(
                ([name, value]) => `${name.replaceAll("_", " ")}: ${fact(value)}`
              ).join("; ") || "always",
            ),
          ]
        ),
      )),
    h("p", { class: "src" }, versions(pathway.versions)),
  ];
}

/** The lines of the rules that give the urgency, where the pathway holds them. */
function why(pathway) {
  const lines = [
    ...pathway.notices,
    ...pathway.follow_up,
    ...pathway.options.flatMap((option) => [...option.offered_by, ...option.restrictions])
  ];
  return pathway.urgency_rules.map((rule) => lines.find((line) => line.rule === rule)).filter(Boolean);
}

const sentences = (lines) => h("ul", { class: "plain lines" }, lines.map((line) => h("li", null, line.text, " ", cite(line))));

function cite(line) {
  return h(
    "span", { class: "src cite" },
    `[${line.rule}; ${line.source}; `,
    h("abbr", { title: VERIFICATION[line.verification] }, line.verification),
    "]",
  );
}

const tagChanged = () => h("span", { class: "tag changed" }, "changed");

function optionView(option, before, said, changed, ask) {
  const same = before && JSON.stringify(before.offered_by) === JSON.stringify(option.offered_by);
  return h(
    "li",
    { class: option.status },
    h("div", { class: "option-head" }, h("span", { class: "title" }, option.title),
      h(
        "span", { class: `option-state ${option.status}` },
        h("span", { "aria-hidden": "true" }, STATUS_MARK[option.status], " "),
        OPTION_STATUS[option.status],
      ),
      changed.has(`option:${option.option}`) && tagChanged()),
    option.restrictions.map((line) => h("p", { class: "restriction" }, line.text, " ", cite(line))),
    option.confirm.length > 0 && h(
      "p", { class: "confirm" },
      "Confirm: ",
      option.confirm.map(
        (name) => h("button", { type: "button", class: "link", onclick: () => ask(name) }, label(name))
      ),
    ),
    !same && because(option.offered_by, said),
  );
}

/** Why an option is offered; a sentence that stands above already is named by its rule. */
function because(lines, said) {
  if (!lines.length) return null;
  const fresh = lines.filter((line) => !said.has(line.rule));
  const old = lines.filter((line) => said.has(line.rule)).map((line) => line.rule);
  for (const line of fresh) said.add(line.rule);
  return h(
    "p", { class: "because" },
    "Because: ",
    fresh.map((line) => [line.text, " ", cite(line), " "]),
    old.length > 0 && h("span", { class: "src cite" }, `[${old.join(", ")}, said above]`),
  );
}

/** Options that are blocked for the same reasons, so that these are said once. */
function grouped(options) {
  const groups = new Map();
  for (const option of options) {
    const reason = overtaken(option) ? "overtaken" : JSON.stringify(option.restrictions);
    groups.set(reason, [...(groups.get(reason) ?? []), option]);
  }
  return [...groups.values()];
}

function blockedView(group, changed) {
  const [first] = group;
  const rules = [...new Set(group.flatMap((option) => option.restrictions.map((line) => line.rule)))];
  return h(
    "li",
    null,
    h("p", null, group.map(
      (option, i) => [i > 0 && ", ", h("s", null, option.title), changed.has(`option:${option.option}`) && tagChanged()]
    ),
      h("span", { class: "unseen" }, " blocked")),
    overtaken(first) ? h(
      "p", { class: "restriction" },
      "Too slow for this urgency ",
      h("span", { class: "src cite" }, `[${rules.join(", ")}]`),
    )
      : first.restrictions.map((line) => h("p", { class: "restriction" }, line.text, " ", cite(line))),
  );
}

function versions(told) {
  const thresholds = Object.entries(told.thresholds).map(([name, value]) => `${label(name)} ${fact(value)}`).join(", ");
  return [
    `DermaFlow ${told.dermaflow}`,
    `model ${told.model} ${told.model_sha256.slice(0, 12)}`,
    `knowledge base ${told.knowledge_base} ${told.knowledge_sha256.slice(0, 12)}`,
    `thresholds ${thresholds || "none"}. The rules are a draft for clinical review, not validated.`,
  ].join(" · ");
}
