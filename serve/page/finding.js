// What the pictures say: picture, heat map, calibrated bars with the conformal set, nearest known lesions.

import { batchPath, blob, call } from "./api.js";
import { announce, bar, dialog, fill, h, paint, problem } from "./dom.js";
import { codes, diagnosis } from "./store.js";
import { malignantMark, setChips } from "./worklist.js";
import { BASIS_TEXT, FINDING_STATUS, FLAG_TEXT, percent, plural } from "./words.js";

/** The column of the pictures. Gives `node`, `toggleHeat` and `update(pathway)`. */
export function pictures(id, findings, pathway, signal) {
  let at = 0;
  let heat = false;
  let turn = 0; // a picture that arrives late must not replace a newer one
  const blobs = new Map();
  const explanations = new Map();
  const canvas = h("canvas", { role: "img", class: "picture" });
  const stage = h("div", { class: "stage" }, canvas);
  const trouble = h("div", null);
  const heatButton = h(
    "button",
    { type: "button", "aria-pressed": "false", "aria-keyshortcuts": "h", onclick: toggleHeat },
    "Heat map",
  );
  const caption = h("figcaption", { class: "src" });
  const about = h("div", null);
  const alike = h("div", null);
  const picker = findings.length > 1 && h("fieldset", { class: "pills" }, h(
    "legend", null,
    "Picture",
  ), findings.map((one, i) => {
    const box = h(
      "input",
      { type: "radio", name: "picture", id: `picture-${i}`, checked: i === 0, onchange: () => { at = i; draw(); } },
    );
    return h("span", { class: "pill" }, box, h("label", { for: `picture-${i}` }, `${i + 1}`));
  }));
  const node = h("div", { class: "look" },
    h(
      "figure", null,
      stage,
      h(
        "div", { class: "picture-tools" },
        heatButton,
        h("button", { type: "button", onclick: enlarge }, "Enlarge"),
        picker,
      ),
      caption,
      trouble,
    ),
    about, alike);

  const path = (rest = "") => batchPath(id, `/images/${encodeURIComponent(findings[at].image_id)}${rest}`);
  const once = (known, make) => {
    const name = findings[at].image_id;
    if (!known.has(name)) {
      known.set(name, make());
      known.get(name).catch(() => known.delete(name)); // the next look asks again
    }
    return known.get(name);
  };
  const image = () => once(blobs, async () => (await blob(path(), signal)).content);
  const explanation = () => once(explanations, () => call(path("/explanation"), { signal }));

  async function draw() {
    turn += 1;
    const mine = turn;
    const finding = findings[at];
    const readable = finding.status !== "failed";
    heatButton.disabled = finding.status !== "ok";
    if (finding.status !== "ok") heat = false;
    heatButton.setAttribute("aria-pressed", String(heat));
    canvas.setAttribute(
      "aria-label",
      `Picture ${finding.image_id}${heat ? ", with the heat map of where the model looked" : ""}`,
    );
    caption.textContent = `${finding.image_id}${findings.length > 1 ? `, ${at + 1} of ${findings.length}` : ""}`;
    fill(about, answer(finding, pathway, findings.length));
    fill(trouble);
    fill(alike);
    stage.classList.add("waiting");
    try {
      if (!readable) throw Object.assign(
        new Error(finding.reason ?? "the picture could not be read"),
        { todo: "Take a new picture." },
      );
      let content = await image();
      if (mine !== turn) return;
      if (heat) {
        const { overlay } = await explanation();
        if (mine !== turn) return;
        if (overlay) content = bytes(overlay);
        else announce("There is no heat map of this picture.");
      }
      await paint(canvas, content);
      stage.hidden = false;
    } catch (error) {
      if (signal.aborted || mine !== turn) return;
      stage.hidden = true;
      fill(trouble, problem(error, "No picture"));
    } finally {
      if (mine === turn) stage.classList.remove("waiting");
    }
    if (finding.status !== "ok" || mine !== turn) return;
    try {
      const { neighbours } = await explanation();
      if (mine === turn) fill(alike, nearest(neighbours));
    } catch (error) {
      if (!signal.aborted && mine === turn) fill(
        alike,
        h("p", { class: "src" }, `No nearest lesions: ${error.message}`),
      );
    }
  }

  function toggleHeat() {
    if (heatButton.disabled) return;
    heat = !heat;
    announce(heat ? "Heat map on" : "Heat map off");
    draw();
  }

  async function enlarge() {
    const big = h("canvas", { role: "img", class: "big", "aria-label": canvas.getAttribute("aria-label") });
    big.width = canvas.width;
    big.height = canvas.height;
    big.getContext("2d").drawImage(canvas, 0, 0);
    dialog(findings[at].image_id, big).classList.add("wide");
  }

  draw();
  return {
    node,
    toggleHeat,
    update: (now) => { pathway = now; fill(about, answer(findings[at], pathway, findings.length)); },
  };
}

function bytes(base64) {
  const text = atob(base64);
  return new Blob([Uint8Array.from(text, (letter) => letter.charCodeAt(0))], { type: "image/png" });
}

function answer(finding, pathway, pictureCount) {
  const flags = [...(finding.quality_flags ?? [])];
  const marks = [
    ...flags.map((flag) => FLAG_TEXT[flag] ?? flag),
    ...(finding.ood ? ["unlike the pictures the model was trained on"] : []),
  ];
  const quality = marks.length > 0 && h(
    "p", { class: "marks" },
    marks.map((text) => h("span", { class: "mark" }, h("span", { "aria-hidden": "true" }, "⚠ "), text)),
  );
  const head = h("h2", null, "What the picture says");
  if (finding.status !== "ok") {
    return [
      head,
      h(
        "p", { class: "not-assessable" },
        h("b", null, FINDING_STATUS[finding.status]),
        finding.reason ? `: ${finding.reason}` : "",
        ". No class is shown; the clinical route decides.",
      ),
      quality,
    ];
  }
  if (pathway && !pathway.assessable) {
    return [
      head,
      h(
        "p", { class: "not-assessable" },
        h("b", null, "not assessable"),
        ". No class is shown; the clinical route decides.",
      ),
      quality,
    ];
  }
  if (pathway?.basis === "histology") {
    return [head, h("p", null, "The pathway follows histology; the picture no longer counts."), quality];
  }
  const order = codes().map(
    (code) => ({ ...diagnosis(code), p: finding[`p_${code}`] ?? 0, inSet: finding.conformal_set?.includes(code) })
  );
  order.sort((a, b) => b.p - a.p);
  return [
    head,
    h("table", { class: "bars" },
      h("caption", { class: "unseen" }, "Calibrated probabilities, most probable first"),
      h(
        "thead", { class: "unseen" },
        h("tr", null, ["in the set", "diagnosis", "bar", "probability"].map((name) => h("th", { scope: "col" }, name))),
      ),
      h("tbody", null, order.map((one) => h("tr", { class: one.inSet ? "in" : "out" },
        h("td", { class: "in-set" }, one.inSet && [
          h("span", { "aria-hidden": "true", title: "in the set" }, "●"),
          h("span", { class: "unseen" }, "in the set"),
        ]),
        h("th", { scope: "row" }, one.name, one.malignant && malignantMark()),
        h("td", { class: "track" }, bar(one.p, one.malignant ? "warm" : "")),
        h("td", { class: "num" }, percent(one.p)))))),
    h(
      "p", { class: "src legend" },
      h("span", { class: "in-set" }, "●"), " in the set: cannot be ruled out",
      h("span", { class: "warm-text" }, "▲"), " malignant",
    ),
    h("p", { class: "sum" }, "All malignant classes together: ", h("b", null, percent(finding.p_malignant))),
    pictureCount > 1 && pathway && h(
      "p", null,
      `Over all ${plural(pathway.image_ids.length, "picture")}: malignant `,
      h("b", null, percent(pathway.p_malignant)),
      ", set ",
      setChips(pathway.conformal_set),
    ),
    quality,
    h(
      "p", { class: "src" },
      !finding.conformal_set?.length && "The set is empty here: no class is typical. ",
      "An estimate from pictures does not rule out cancer.",
      pathway && ` Decided from ${BASIS_TEXT[pathway.basis]}.`,
    ),
  ];
}

function nearest(neighbours) {
  if (!neighbours?.length) return null;
  return [
    h("h2", null, "Nearest known lesions"),
    h("ol", { class: "plain nearest" }, neighbours.map((one) => {
      const { name, malignant } = diagnosis(one.dx);
      return h("li", null, h("span", null, name, malignant && malignantMark()),
        h("span", { class: "src" }, `${one.image_id}, distance ${one.distance.toFixed(2)}`));
    })),
    h(
      "p", { class: "src" },
      "Training lesions that look most alike to the network; their pictures stay with the training data.",
    ),
  ];
}
