// The server's API: requests with the key where one is needed, errors as it says them, streams.

import { forTab } from "./kept.js";

const KEY = "reft-key";

/** Asks the user for the API key; `refused` says that one was given and is wrong. Set by app.js. */
let askForKey = null;
let asking = null;

export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** An error as the API says it. `again` is when the request may be sent again, in ms of Unix time. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, again = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.param = param;
    this.again = again;
  }
}

/** The address of a route: relative to the page, which may lie behind a path of a proxy. */
export const address = (path) => new URL(path, new URL(".", document.baseURI)).href;

export const key = () => forTab.get(KEY);

/** A key as fetch takes it, which writes one byte for each character: those of its UTF-8. */
const inHeader = (text) => String.fromCharCode(...new TextEncoder().encode(text));

export function forgetKey() {
  forTab.delete(KEY);
}

/**
 * The response to a request, its status checked; asks for the key where it is missing or wrong.
 * `onSend` is called each time that the request is sent.
 */
export async function send(path, { method = "GET", json, body, headers = {}, signal, onSend } = {}) {
  for (;;) {
    const used = key();
    onSend?.();
    const response = await fetched(path, {
      method,
      signal,
      body: json === undefined ? body : JSON.stringify(json),
      headers: {
        ...(json === undefined ? {} : { "content-type": "application/json" }),
        ...(used ? { authorization: `Bearer ${inHeader(used)}` } : {}),
        ...headers,
      },
    });
    if (response.ok) return response;
    if (response.status !== 401 || !askForKey) throw await failure(response);
    // Several requests may find at once that a key is needed: it is asked for once.
    if (key() === used) {
      asking ??= askForKey(used !== null).finally(() => (asking = null));
      const given = await asking;
      if (!given) throw await failure(response);
      forTab.set(KEY, given);
    }
  }
}

/** Routes whose requests a tenant may have so many of at once. */
const COUNTED = new Set(["v1/completions", "v1/chat/completions", "v1/classify"]);

let most = Infinity;
let underWay = 0;
const waiting = [];

/** At most `count` requests for answers are under way at once, and the others wait; null for all. */
export function allow(count) {
  most = count ?? Infinity;
  wake();
}

async function enter(signal) {
  while (underWay >= most && !signal?.aborted) {
    await new Promise((go) => {
      waiting.push(go);
      signal?.addEventListener("abort", go, { once: true });
    });
  }
  signal?.throwIfAborted();
  underWay += 1;
}

function leave() {
  underWay -= 1;
  wake();
}

/** Let all that wait look for room; some may have been aborted. */
function wake() {
  for (const go of waiting.splice(0)) go();
}

/** What a route answers: the JSON of its body, or a `blob`. */
export async function ask(path, options = {}) {
  if (!COUNTED.has(path)) return body(path, options);
  await enter(options.signal);
  try {
    return await body(path, options);
  } finally {
    leave();
  }
}

async function body(path, { read = "json", ...options }) {
  const response = await send(path, options);
  try {
    return await response[read]();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server's answer broke off, or is not one of its own.", { code: "unreadable" });
  }
}

/**
 * The events of a streamed answer, parsed; an error within the stream is thrown. `onStage` is told how
 * far the request is: "sent", later perhaps than it is asked for, and "taken" by the server.
 */
export async function* stream(path, json, signal, onStage) {
  await enter(signal);
  try {
    yield* events(path, json, signal, onStage);
  } finally {
    leave();
  }
}

async function* events(path, json, signal, onStage) {
  const response = await send(path, { method: "POST", json, signal, onSend: () => onStage("sent") });
  onStage("taken");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("The answer broke off.", { code: "unreadable" });
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (!part.startsWith("data: ")) continue;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new ApiError(event.error.message, event.error);
      yield event;
    }
  }
}

/** Save bytes as a file of this name. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function fetched(path, options) {
  try {
    return await fetch(address(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", { code: "unreachable" });
  }
}

async function failure(response) {
  const { status } = response;
  const wait = Number(response.headers.get("retry-after"));
  const again = wait > 0 ? Date.now() + wait * 1000 : null;
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { ...error, status, again });
  } catch {
    return new ApiError(`The server answered ${status}.`, { status, again });
  }
}
