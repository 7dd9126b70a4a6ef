// The HTTP API: calls with the key, errors that say what to do, uploads with progress, events with a way out.

const KEY = "dermaflow.key"; // of sessionStorage: gone with the tab, never written to disk by this page

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** A refusal of the server, or no answer at all (status 0). */
export class Problem extends Error {
  constructor(status, body, requestId) {
    const told = body?.error ?? {};
    super(told.message ?? (status ? `The server answered ${status}.` : "The server does not answer."));
    this.status = status;
    this.code = told.code ?? null;
    this.expected = told.expected ?? null;
    this.todo = told.todo ?? (
      status ? null : "See whether the server runs and whether this machine is connected, then try again."
    );
    this.requestId = told.request_id ?? requestId ?? null;
  }
}

function headers(extra) {
  return key.get() ? { ...extra, Authorization: `Bearer ${key.get()}` } : { ...extra };
}

function refused(status, text, requestId) {
  let body = null;
  try { body = JSON.parse(text); } catch { /* a proxy's page: the status has to do */ }
  // one place asks for the key, whatever call was refused
  if (status === 401) document.dispatchEvent(new CustomEvent("key-needed"));
  return new Problem(status, body, requestId);
}

async function response(path, options) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0);
  }
  if (!answer.ok) throw refused(answer.status, await answer.text(), answer.headers.get("X-Request-Id"));
  return answer;
}

/** JSON of a path. `json` is sent as the body. */
export async function call(path, { method = "GET", json, signal } = {}) {
  const body = json === undefined ? undefined : JSON.stringify(json);
  const type = body === undefined ? {} : { "Content-Type": "application/json" };
  return (await response(path, { method, body, headers: headers(type), signal })).json();
}

/** Content of a path, for pictures and files. */
export async function blob(path, signal) {
  const answer = await response(path, { headers: headers(), signal });
  const name = /filename="?([^";]+)/.exec(answer.headers.get("Content-Disposition") ?? "");
  return { content: await answer.blob(), name: name?.[1] ?? null };
}

/** Send a form; `sent` is told the share that has left this machine. */
export function upload(path, form, sent, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch cannot tell how much of the body has left
    request.open("POST", path);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => event.lengthComputable && sent(event.loaded / event.total));
    request.addEventListener("error", () => reject(new Problem(0, { error: {
      message: "The connection broke while sending.",
      todo: "See whether the server runs. It also cuts off what is larger than it accepts: try a smaller archive.",
    } })));
    request.addEventListener("abort", () => reject(new DOMException("given up", "AbortError")));
    request.addEventListener("load", () => {
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(refused(request.status, request.responseText, request.getResponseHeader("X-Request-Id")));
    });
    signal?.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

export const batchPath = (id, rest = "") => `v1/batches/${encodeURIComponent(id)}${rest}`;
export const ended = (batch) => ["finished", "failed", "cancelled"].includes(batch.state);

/** Tell `seen` each new state of a batch until its last one: from server-sent events, by asking where there are none. */
export async function watch(id, seen, signal) {
  let broken = 0;
  while (!signal.aborted) {
    try {
      if (broken < 3) {
        for await (const batch of events(batchPath(id, "/events"), signal)) {
          seen(batch);
          if (ended(batch)) return;
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      if ([401, 403].includes(error.status)) throw error;
    }
    broken += 1;
    await pause(2000, signal);
    if (signal.aborted) return;
    try {
      const batch = await call(batchPath(id), { signal });
      seen(batch);
      if (ended(batch)) return;
    } catch (error) {
      if (signal.aborted) return;
      if ([401, 403, 404].includes(error.status)) throw error;
    }
  }
}

async function* events(path, signal) {
  // EventSource cannot send the key
  const answer = await response(path, { headers: headers({ Accept: "text/event-stream" }), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text = (text + value).replaceAll("\r\n", "\n");
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data.trim()) yield JSON.parse(data);
    }
  }
}

export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}

/** Let the browser save a path. With a key it has to be fetched here, because a link cannot send one. */
export async function save(path, fallback) {
  const { content, name } = await blob(path);
  const address = URL.createObjectURL(content);
  const link = document.createElement("a");
  link.href = address;
  link.download = name ?? fallback;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
