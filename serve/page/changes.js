// What an input changed: two pathways of the same lesion, compared.

import { OPTION_STATUS, plural, URGENCY_TEXT } from "./words.js";

/**
 * Compare two pathways.
 * Gives `marks`, the parts to mark (`urgency`, `option:ID`, `notice:RULE`), and `lines`, the same in words.
 */
export function compare(before, after) {
  const marks = new Set();
  const lines = [];
  if (!before) return {
    marks,
    lines: after ? [`There is a pathway now: ${after.urgency}, ${URGENCY_TEXT[after.urgency]}.`] : [],
  };
  if (!after) return { marks, lines };
  if (before.urgency !== after.urgency) {
    marks.add("urgency");
    const way = after.urgency < before.urgency ? "more urgent" : "less urgent";
    lines.push(`Urgency ${before.urgency} → ${after.urgency} (${way}): ${URGENCY_TEXT[after.urgency]}.`);
  }
  if (before.assessable !== after.assessable) {
    lines.push(after.assessable ? "Now assessable." : "No longer assessable.");
  }
  const old = new Map(before.options.map((option) => [option.option, option]));
  for (const option of after.options) {
    const was = old.get(option.option);
    old.delete(option.option);
    if (was?.status === option.status) continue;
    marks.add(`option:${option.option}`);
    const now = OPTION_STATUS[option.status];
    lines.push(was ? `${option.title}: ${OPTION_STATUS[was.status]} → ${now}.` : `New: ${option.title}, ${now}.`);
  }
  for (const option of old.values()) lines.push(`No longer offered: ${option.title}.`);
  const rules = new Set(before.notices.map((line) => line.rule));
  for (const line of after.notices) {
    if (rules.has(line.rule)) continue;
    marks.add(`notice:${line.rule}`);
    lines.push(`New notice ${line.rule}: ${line.text}`);
  }
  const now = new Set(after.notices.map((line) => line.rule));
  for (const line of before.notices) if (!now.has(line.rule)) lines.push(`Notice ${line.rule} no longer applies.`);
  const open = after.missing.length - before.missing.length;
  if (open) lines.push(
    open > 0 ? `${plural(open, "more question")} would matter.` : `${plural(-open, "question")} fewer would matter.`
  );
  if (before.sign_off && !after.sign_off) lines.push(
    "The earlier signature no longer holds; this pathway is preliminary."
  );
  return { marks, lines };
}
