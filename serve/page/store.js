// What the page knows between two views: the model, the fields of a case, and the work list as it was filtered.

import { batchPath, call } from "./api.js";

const store = { model: null, fields: null, lists: new Map() };

const AT_ONCE = 50_000; // rows of a work list that are asked for at once

export const PLAIN_FILTER = { urgency: [], flagged: false, unsigned: false, text: "" };

export async function loadModel() {
  store.model = await call("v1/model");
  return store.model;
}

export const model = () => store.model;

/** A diagnosis by its code: name and whether it is malignant; null where the model does not say. */
export function diagnosis(code) {
  const found = store.model?.classes?.find((one) => one.code === code);
  return { code, name: found?.name ?? code, malignant: found?.malignant ?? null };
}

export const codes = () => store.model?.classes?.map((one) => one.code) ?? [];

/** Fields of patient and lesion by their fact name (`patient.age`). */
export async function loadFields() {
  if (store.fields === null) {
    const told = await call("v1/fields");
    const named = (whose) => told[whose].filter((f) => !f.name.endsWith("_id")).map((f) => [`${whose}.${f.name}`, f]);
    store.fields = new Map([...named("patient"), ...named("lesion")]);
  }
  return store.fields;
}

/** The work list of a batch: rows as the server orders them, and the filter. */
export async function loadList(id, { fresh = false, signal } = {}) {
  const known = store.lists.get(id);
  if (known && !fresh) return known;
  const rows = [];
  for (;;) {
    const path = batchPath(id, `/worklist?limit=${AT_ONCE}&offset=${rows.length}`);
    const { lesions, total } = await call(path, { signal });
    rows.push(...lesions);
    if (!lesions.length || rows.length >= (total ?? 0)) break;
  }
  const list = { rows, filter: known?.filter ?? { ...PLAIN_FILTER }, last: known?.last };
  store.lists.set(id, list);
  return list;
}

/** Rows that pass the filter, in their order. */
export function filtered({ rows, filter }) {
  const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean);
  return rows.filter((row) => {
    if (filter.urgency.length && !filter.urgency.includes(row.urgency)) return false;
    if (filter.flagged && !row.flagged) return false;
    if (filter.unsigned && row.signed) return false;
    if (!words.length) return true;
    const name = row.prediction ? diagnosis(row.prediction).name : row.status.replaceAll("_", " ");
    const text = [row.lesion_id, row.patient_id, row.prediction, name, row.urgency, row.signed].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

/** Bring a row up to date after its pathway changed; the order stays until the list is loaded again. */
export function touch(id, pathway) {
  const row = store.lists.get(id)?.rows.find((one) => one.lesion_id === pathway.lesion_id);
  if (!row) return;
  row.urgency = pathway.urgency;
  row.signed = pathway.sign_off?.decision ?? null;
  row.patient_id = pathway.patient_id;
}

export const link = {
  batch: (id) => `#/batch/${encodeURIComponent(id)}`,
  lesion: (id, lesion) => `#/batch/${encodeURIComponent(id)}/lesion/${encodeURIComponent(lesion)}`,
};
