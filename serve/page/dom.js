// Elements without markup: whatever a server or a file says goes in as text and can never become an element.

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected", "indeterminate", "tabIndex"]);

/** An element with properties, listeners (`onclick`), a class, attributes and children (nodes, text, lists, null). */
export function h(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (PROPERTIES.has(name)) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...kept(children));
  return node;
}

/** Put other content into an element. */
export function fill(node, ...children) {
  node.replaceChildren(...kept(children));
  return node;
}

function kept(children) {
  return children
    .flat(Infinity)
    .filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : String(child)));
}

let serial = 0;

/** An id that no other element has. */
export function freshId(stem) {
  serial += 1;
  return `${stem}-${serial}`;
}

/** Say something to screen readers, without moving the focus. */
export function announce(text) {
  const live = document.getElementById("live");
  live.textContent = "";
  // the same words twice are only said twice when the region was empty in between
  setTimeout(() => { live.textContent = text; }, 60);
}

/** A bar as long as its share (0 to 1); set through the object model, which the content policy allows. */
export function bar(share, kind = "") {
  const inner = h("span", { class: "bar-fill" });
  inner.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return h("span", { class: `bar ${kind}`, "aria-hidden": "true" }, inner);
}

/** What went wrong, and what to do: for every refusal of the server and every failed connection. */
export function problem(error, heading = "That did not work") {
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("p", null, h("b", null, heading), ": ", error.message),
    error.expected && h("p", null, "Expected: ", error.expected),
    error.todo && h("p", null, "What to do: ", error.todo),
    error.requestId && h("p", { class: "src" }, "Request ", error.requestId),
  );
}

/** An encoded picture on a canvas: no address, so the content policy needs no exception for it. */
export async function paint(canvas, blob) {
  const picture = await createImageBitmap(blob);
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d").drawImage(picture, 0, 0);
  picture.close();
}

/** A dialog with a heading and a way out; it gives the focus back when it closes. */
export function dialog(title, ...content) {
  const id = freshId("dialog");
  const box = h(
    "dialog",
    { "aria-labelledby": id },
    h("div", { class: "dialog-head" }, h("h2", { id }, title),
      h("button", { type: "button", class: "quiet", onclick: () => box.close() }, "Close")),
    content,
  );
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
  return box;
}
