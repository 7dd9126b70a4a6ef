// The model behind the answers: figures, thresholds and card.

import { h } from "./dom.js";
import { loadModel } from "./store.js";
import { fact, label } from "./words.js";

export async function showModel(place) {
  const told = await loadModel();
  place.append(
    h("h1", { tabindex: "-1" }, "Model ", told.name),
    h(
      "p", { class: "lead" },
      "For research; not for diagnosis. Its figures were measured on lesions that it never saw.",
    ),
    h("div", { class: "columns" },
      h("section", null, h("h2", null, "What it is"), facts({
        version: told.version, "sha256": told.sha256, backbone: told.backbone, input: told.input,
      }), told.metrics && [h("h2", null, "Measured"), facts(told.metrics)],
      told.thresholds && [h("h2", null, "Thresholds"), facts(told.thresholds)]),
      h("section", null, h("h2", null, "Diagnoses it can say"),
        h("ul", { class: "plain" }, (told.classes ?? []).map((one) =>
          h(
            "li", null,
            h("code", null, one.code),
            " ",
            one.name,
            one.malignant && h("span", { class: "tag warm" }, "malignant"),
          ))),
        told.card && [
          h("h2", null, "Card"),
          h("pre", { class: "card-text", tabindex: "0", "aria-label": "Model card" }, told.card),
        ]),
    ),
  );
}

function facts(record) {
  return h("dl", { class: "facts" }, Object.entries(record).map(([name, value]) =>
    [h("dt", null, label(name)), h("dd", null, fact(value))]));
}
