// How things are written for people; the same words as on the pathway pages of `dermaflow recommend`.

export const URGENCIES = ["U1", "U2", "U3", "U4", "U5"];
export const URGENCY_SHORT = { U1: "urgent", U2: "soon", U3: "routine", U4: "monitor", U5: "low risk" };
export const URGENCY_TEXT = {
  U1: "urgent suspected cancer: refer now",
  U2: "soon: clinician or dermatology within 2 to 6 weeks",
  U3: "routine dermatology",
  U4: "monitor with a dated review",
  U5: "low estimated risk: reassure and safety-net, after a clinician signs",
};
export const OPTION_STATUS = {
  available: "possible", caution: "with caution", locked: "locked: confirm first", blocked: "blocked",
};
export const STATE_TEXT = {
  queued: "waiting", running: "running", finished: "finished", failed: "failed", cancelled: "cancelled",
};
export const FINDING_STATUS = { ok: "assessed", not_assessable: "not assessable", failed: "not readable" };
export const VERIFICATION = {
  V: "read in a published source", P: "partly seen in a published source", M: "from memory, needs a check",
};
export const FLAG_TEXT = {
  blur: "blurred", exposure: "too dark or too bright", occlusion: "covered by hair or ink",
  lesion_out_of_frame: "lesion not wholly in the picture", not_dermoscopy: "not a dermoscopic picture",
};
export const BASIS_TEXT = { image: "the pictures", histology: "histology", none: "neither pictures nor histology" };
export const TEXT_TITLES = {
  "T-SN": "Safety net", "T-mel": "Suspicious spot", "T-bcc": "Basal cell carcinoma", "T-ak": "Sun damage",
  "T-nv": "Harmless-looking spot", "T-bkl": "Harmless-looking spot", "T-df": "Harmless-looking spot",
  "T-vasc": "Harmless-looking spot", "T-dark": "Darker skin", "T-preg": "Pregnancy and breast-feeding",
  "T-bloodthinner": "Blood thinner",
};
const LABELS = {
  fitzpatrick: "skin type (Fitzpatrick)",
  inr: "INR",
  dpd_deficiency: "DPD deficiency",
  diameter_mm: "diameter (mm)",
  breslow_mm: "Breslow thickness (mm)",
};

/** Name of a field or a fact: `patient.prior_melanoma` becomes `prior melanoma`. */
export function label(name) {
  const short = String(name).replace(/^(patient|lesion)\./, "");
  return LABELS[short] ?? short.replaceAll("_", " ");
}

/** `72 %`; never 0 or 100, which nothing certain is. */
export function percent(p) {
  if (p === null || p === undefined) return "–";
  if (p < 0.01) return "<\u00a01\u00a0%";
  return p > 0.99 ? ">\u00a099\u00a0%" : `${Math.round(p * 100)}\u00a0%`;
}

export function count(n) {
  return n === null || n === undefined ? "–" : n.toLocaleString("en-GB");
}

export function plural(n, one, many = `${one}s`) {
  return `${count(n)}\u00a0${n === 1 ? one : many}`;
}

/** A model by its version, which may hold its name already. */
export function modelText({ name, version }) {
  return version?.startsWith(name) ? version : `${name} ${version ?? ""}`;
}

/** Seconds as people say them. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

export function rate(value) {
  if (value === null || value === undefined) return "–";
  return `${value >= 10 ? Math.round(value).toLocaleString("en-GB") : value.toFixed(1)} images/s`;
}

export function size(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export function when(text) {
  const date = new Date(text);
  if (!text || Number.isNaN(date.getTime())) return text ?? "–";
  return date.toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
}

/** The value of a fact. */
export function fact(value) {
  if (value === true || value === false) return value ? "yes" : "no";
  if (value === null || value === undefined) return "unknown";
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3)));
  if (Array.isArray(value)) return value.map(fact).join(", ") || "none";
  if (typeof value === "object") return Object.entries(value).map(([k, v]) => `${label(k)} ${fact(v)}`).join(", ");
  return String(value).replaceAll("_", " ");
}
