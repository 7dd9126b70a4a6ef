// Single keys for people who go through a hundred lesions an hour. They can be switched off (WCAG 2.1.4).

import { dialog, h } from "./dom.js";

const OFF = "dermaflow.keys"; // of localStorage: "off" where single keys are not wanted

let bound = new Map();

/** The keys of the view that is shown: `{ j: { does: "next lesion", run } }`. Those of the last view go. */
export function bindKeys(keys) {
  bound = new Map(Object.entries(keys));
}

const on = () => localStorage.getItem(OFF) !== "off";

function typing(target) {
  if (!(target instanceof HTMLElement)) return false;
  if (target.matches("input")) return !["radio", "checkbox", "button", "submit"].includes(target.type);
  return target.matches("textarea, select") || target.isContentEditable;
}

export function listen() {
  document.addEventListener("keydown", (event) => {
    if (!on() || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (typing(event.target) || document.querySelector("dialog[open]")) return;
    const found = event.key === "?" ? { run: showKeys } : bound.get(event.key);
    if (!found) return;
    event.preventDefault();
    found.run();
  });
}

/** Which keys there are here, and the switch for them. */
export function showKeys() {
  const rows = [...bound, ["?", { does: "this list" }]];
  const box = h("input", {
    type: "checkbox", id: "keys-on", checked: on(),
    onchange: () => (box.checked ? localStorage.removeItem(OFF) : localStorage.setItem(OFF, "off")),
  });
  dialog(
    "Keys of this view",
    h(
      "dl", { class: "keys" },
      rows.map(([name, { does }]) => [h("dt", null, h("kbd", null, name)), h("dd", null, does)]),
    ),
    h("p", null, box, " ", h("label", { for: "keys-on" }, "Single keys are on")),
    h("p", { class: "src" }, "Tab, Enter, Space and the arrow keys work everywhere; single keys rest while you type."),
  );
}
