// Start: address to view, theme, model line, key.

import { key } from "./api.js";
import { showBatch } from "./batch.js";
import { showBatches } from "./batches.js";
import { announce, dialog, fill, h, problem } from "./dom.js";
import { bindKeys, listen, showKeys } from "./keys.js";
import { showLesion } from "./lesion.js";
import { showModel } from "./modelcard.js";
import { loadModel, model } from "./store.js";
import { modelText } from "./words.js";

const main = document.getElementById("main");
let leaving = new AbortController();

const ROUTES = [
  [/^#\/batch\/([^/]+)\/lesion\/([^/]+)$/, showLesion, "batches"],
  [/^#\/batch\/([^/]+)$/, showBatch, "batches"],
  [/^#\/model$/, showModel, "model"],
  [/^(#\/)?$/, showBatches, "batches"],
];

async function show() {
  const hash = location.hash;
  if (hash && !hash.startsWith("#/")) return; // a jump inside the page
  leaving.abort(); // streams and requests of the view before
  leaving = new AbortController();
  const { signal } = leaving;
  const [found, view, route] = match(hash);
  for (const one of document.querySelectorAll("nav [data-route]")) {
    if (one.dataset.route === route) one.setAttribute("aria-current", "page");
    else one.removeAttribute("aria-current");
  }
  bindKeys({});
  const place = h("div", { class: "view" });
  try {
    // the names of the diagnoses come with the model; only the dashboard makes sense without, and there it may be new
    const home = view === showBatches;
    if (!model() || home) {
      await learnModel().catch((error) => { if (!home || [401, 403].includes(error.status)) throw error; });
    }
    await view(place, { signal, shown: () => settle(place, signal) }, ...found.slice(1).map(decodeURIComponent));
    settle(place, signal);
  } catch (error) {
    if (signal.aborted) return;
    fill(place, h("h1", { tabindex: "-1" }, error.status === 401 ? "A key is needed" : "Nothing to show"),
      problem(error, "The server refused"),
      h(
        "p", null,
        h("button", { type: "button", onclick: show }, "Try again"),
        " ",
        h("a", { href: "#/" }, "All batches"),
      ));
    settle(place, signal);
  }
}

function match(hash) {
  for (const [pattern, view, route] of ROUTES) {
    const found = pattern.exec(hash);
    if (found) return [found, view, route];
  }
  return [[""], showBatches, "batches"];
}

/** Put a view on the page and the focus on its heading; once for each view. */
function settle(place, signal) {
  if (signal.aborted || place.isConnected) return;
  fill(main, place);
  const heading = place.querySelector("h1");
  document.title = heading ? `${heading.textContent} · DermaFlow` : "DermaFlow";
  heading?.focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

async function learnModel() {
  const told = await loadModel();
  const line = document.getElementById("model");
  fill(line, "model ", h("b", { title: `sha256 ${told.sha256}` }, modelText(told)));
}

// the key

const keyButton = document.getElementById("key");
let asking = null;

function askForKey() {
  keyButton.hidden = false;
  if (asking?.open) return;
  const field = h(
    "input",
    { id: "key-field", type: "password", autocomplete: "off", spellcheck: "false", value: key.get() ?? "" },
  );
  const form = h(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        key.set(field.value.trim());
        asking.close();
        announce(key.get() ? "The key is set." : "The key was removed.");
        show();
      },
    },
    h("p", null, "This server wants an API key. It stays in this tab and is gone when you close it."),
    h("p", null, h("label", { for: "key-field" }, "API key"), field),
    h("p", { class: "actions" }, h("button", { class: "primary" }, "Use this key")),
  );
  asking = dialog("API key", form);
  field.focus();
}

document.addEventListener("key-needed", askForKey);
keyButton.addEventListener("click", askForKey);
keyButton.hidden = !key.get();

// the theme

const THEMES = ["auto", "light", "dark"];
const themeButton = document.getElementById("theme");

function useTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  localStorage.setItem("dermaflow.theme", name);
  themeButton.textContent = `Theme: ${name}`;
}

themeButton.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(localStorage.getItem("dermaflow.theme") ?? "auto") + 1) % THEMES.length];
  useTheme(next);
  announce(`Theme: ${next}`);
});
useTheme(THEMES.includes(localStorage.getItem("dermaflow.theme")) ? localStorage.getItem("dermaflow.theme") : "auto");

document.getElementById("keys").addEventListener("click", showKeys);
listen();
window.addEventListener("hashchange", show);
// a file that misses the drop zone must not replace the page
for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());
show();
