// A comparison as plain data: what is asked of which column, the requests it makes, and how it is
// written into a link. Nothing here touches the document, so every other module may rely on it.

export const MAX_COLUMNS = 4;
export const ALTERNATIVES = 5;
export const STRENGTH = { min: -2, max: 2, step: 0.05 };

const UNBOUND = { value: 128, max: 4096 };

/** Sampling settings: the default, which a request leaves out unless `always`, and a field's bounds. */
export const SAMPLING = {
  max_tokens: { label: "Max tokens", ...UNBOUND, min: 1, step: 1, always: true },
  temperature: { label: "Temperature", value: 0, min: 0, max: 2, step: 0.05, always: true },
  top_p: { label: "Top p", value: 1, min: 0.01, max: 1, step: 0.01 },
  top_k: { label: "Top k", value: 0, min: 0, max: 1000, step: 1 },
  min_p: { label: "Min p", value: 0, min: 0, max: 1, step: 0.01 },
  repetition_penalty: { label: "Repetition penalty", value: 1, min: 0.5, max: 2, step: 0.05 },
  presence_penalty: { label: "Presence penalty", value: 0, min: -2, max: 2, step: 0.05 },
  frequency_penalty: { label: "Frequency penalty", value: 0, min: -2, max: 2, step: 0.05 },
  seed: { label: "Seed", value: null, step: 1 },
};

/** Let new comparisons ask for answers of at most so many tokens; null is the page's own bound. */
export function boundAnswers(most) {
  const { max, value } = UNBOUND;
  Object.assign(SAMPLING.max_tokens, { max: Math.min(max, most ?? max), value: Math.min(value, most ?? value) });
}

export const part = (name) => ({ name, strength: 1, directions: null });

export const column = (...names) => ({ parts: names.map(part) });

export function newSession(columns = [column()]) {
  return {
    mode: "chat",
    system: "",
    columns,
    turns: [],
    sampling: Object.fromEntries(Object.entries(SAMPLING).map(([name, { value }]) => [name, value])),
    stop: "",
    colour: "probability",
  };
}

/** What a column applies, in words: `base`, `pirate`, `pirate × 0.5 + emoji`. */
export function title({ parts }) {
  if (!parts.length) return "Base model";
  return parts
    .map(({ name, strength }) => (strength === 1 ? name : `${name} × ${strength}`))
    .join(" + ");
}

/** Route and body of the request that answers turn `t` in column `c`. */
export function requestOf(session, base, c, t) {
  const chat = session.mode === "chat";
  const body = { ...used(session.columns[c], base) };
  if (chat) body.messages = messages(session, c, t);
  else body.prompt = session.turns[t].user;
  for (const [name, { value, always }] of Object.entries(SAMPLING)) {
    const given = session.sampling[name];
    if (given !== null && (always || given !== value)) body[name] = given;
  }
  const stop = session.stop.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  return { path: chat ? "v1/chat/completions" : "v1/completions", body };
}

/** `body` as a streamed request with the log-probabilities that the page shows. */
export function shown(body) {
  const scored = body.messages
    ? { logprobs: true, top_logprobs: ALTERNATIVES }
    : { logprobs: ALTERNATIVES };
  return { ...body, stream: true, stream_options: { include_usage: true }, return_token_ids: true, ...scored };
}

export function used({ parts }, base) {
  if (!parts.length) return { model: base };
  const [{ name, strength, directions }] = parts;
  if (parts.length === 1 && strength === 1 && !directions) return { model: name };
  const interventions = parts.map((one) => ({
    name: one.name,
    ...(one.strength === 1 ? {} : { strength: one.strength }),
    ...(one.directions ? { subspace: one.directions } : {}),
  }));
  return { model: base, interventions };
}

function messages({ system, turns }, c, t) {
  const said = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, t)) {
    const text = turn.answers[c]?.text;
    // A column that came later was not asked then, and one that failed has said nothing.
    if (!text) continue;
    said.push({ role: "user", content: turn.user }, { role: "assistant", content: text });
  }
  return [...said, { role: "user", content: turns[t].user }];
}

/** Fields of a session from a request's JSON; throws an Error that says what is wrong. */
export function fromRequest(text, base) {
  const body = parsed(text);
  if (!body || typeof body !== "object" || Array.isArray(body)) {
    throw new Error("Paste the JSON object of one request.");
  }
  for (const [name, { is, what }] of Object.entries(TAKEN)) {
    if (!left(is)(body[name])) throw new Error(`${name} must be ${what}.`);
  }
  const found = { sampling: {} };
  for (const name of Object.keys(SAMPLING)) {
    const value = body[name] ?? (name === "max_tokens" ? body.max_completion_tokens : null) ?? null;
    if (!orNull(isNumber)(value)) throw new Error(`${name} must be a number.`);
    if (value !== null) found.sampling[name] = value;
  }
  found.stop = [body.stop ?? []].flat().join("\n");
  found.parts = parts(body, base);
  if (Array.isArray(body.messages)) {
    found.mode = "chat";
    Object.assign(found, conversation(body.messages));
  } else if (typeof body.prompt === "string") {
    found.mode = "text";
    found.system = "";
    found.turns = [{ user: body.prompt }];
  } else {
    throw new Error("The request needs messages, or a prompt that is a text.");
  }
  return found;
}

function parts({ model, interventions }, base) {
  if (interventions?.length) {
    return interventions.map(({ name, strength, subspace }) => ({
      name, strength: strength ?? 1, directions: subspace ?? null,
    }));
  }
  const name = (model ?? base).replace(`${base}:`, "");
  return name === base ? [] : [part(name)];
}

function conversation(list) {
  const texts = list.map(({ role, content }) => ({
    role: role === "developer" ? "system" : role,
    text: isText(content) ? content : (content ?? []).map((piece) => piece.text).join(""),
  }));
  const system = texts.filter(({ role }) => role === "system").map(({ text }) => text).join("\n\n");
  const turns = [];
  for (const { role, text } of texts) {
    if (role === "user") turns.push({ user: text });
    else if (role === "assistant" && turns.length) turns.at(-1).answer = text;
  }
  if (!turns.length) throw new Error("The request's messages have no user turn.");
  return { system, turns };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}.`);
  }
}

// Links and files

/** What is kept of an answer: its text and figures, and with `whole` its tokens. */
const kept = (whole) => (answer) =>
  answer && {
    of: answer.of,
    thought: answer.thought,
    text: answer.text,
    figures: answer.figures,
    finish: answer.finish,
    labels: answer.labels ?? null,
    pieces: whole ? answer.pieces : [],
    prompt: whole ? answer.prompt : [],
    ids: whole ? answer.ids : [],
  };

export function plain(session, whole) {
  const turns = session.turns.map(({ user, answers }) => ({
    user, answers: answers.map(kept(whole)),
  }));
  return { version: 1, ...session, turns };
}

const isText = (value) => typeof value === "string";
const isNumber = (value) => Number.isFinite(value);
const oneOf = (...values) => (value) => values.includes(value);
const orNull = (is) => (value) => value === null || is(value);
const left = (is) => (value) => value === undefined || orNull(is)(value);
const listOf = (is) => (value) => Array.isArray(value) && value.every(is);
const shaped = (fields) => (value) =>
  value !== null && typeof value === "object" && Object.entries(fields).every(([name, is]) => is(value[name]));

/** What a pasted request may have in the fields that the page reads, if they are given. */
const TAKEN = {
  model: { is: isText, what: "a name" },
  stop: { is: (value) => isText(value) || listOf(isText)(value), what: "a text or a list of texts" },
  messages: {
    is: listOf(shaped({
      role: isText,
      content: left((value) => isText(value) || listOf(shaped({ text: isText }))(value)),
    })),
    what: 'a list of objects, such as {"role": "user", "content": "Hi"}, with texts alone',
  },
  interventions: {
    is: listOf(shaped({ name: isText, strength: left(isNumber), subspace: left(listOf(isNumber)) })),
    what: 'a list of objects, such as {"name": "pirate", "strength": 0.5}',
  },
};

const isToken = { text: isText, logprob: orNull(isNumber) };

/** Whether a session has all that views rely on; `left` marks what may be left out. */
const isSession = shaped({
  mode: oneOf("chat", "text"),
  colour: oneOf("none", "probability", "distance"),
  system: isText,
  stop: isText,
  sampling: shaped(Object.fromEntries(Object.keys(SAMPLING).map((name) => [name, orNull(isNumber)]))),
  columns: listOf(shaped({
    parts: listOf(shaped({ name: isText, strength: isNumber, directions: orNull(listOf(isNumber)) })),
  })),
  turns: listOf(shaped({
    user: isText,
    answers: listOf(orNull(shaped({
      of: left(isText),
      thought: left(isText),
      labels: left(listOf(shaped({ label: isText, prob: isNumber }))),
      text: isText,
      figures: orNull(shaped(Object.fromEntries(
        ["tokens", "first", "rate", "prompt", "cached"].map((name) => [name, orNull(isNumber)])))),
      prompt: listOf(isNumber),
      ids: listOf(isNumber),
      pieces: listOf(shaped({
        text: isText,
        tokens: listOf(shaped({ ...isToken, base: left(isNumber), top: listOf(shaped(isToken)) })),
      })),
    }))),
  })),
});

/** A session from what `plain` wrote; throws an Error for anything else. */
export function revived(data) {
  const { version, ...given } = data ?? {};
  const fresh = newSession();
  const session = { ...fresh, ...given, sampling: { ...fresh.sampling, ...given.sampling } };
  const count = session.columns?.length;
  if (version !== 1 || !isSession(session) || !count || count > MAX_COLUMNS) {
    throw new Error("This is no saved comparison.");
  }
  return session;
}

/** The longest session in an address, in characters: Firefox remembers no address above 65,536. */
const MAX_LINK = 60_000;

/**
 * A session for an address: `whole` as text, and `link`, which is the same or, where that is too long,
 * has the columns and settings without any text.
 */
export async function linked(session) {
  const whole = await packed(session);
  const bare = { ...session, turns: [], system: "", stop: "" };
  return { whole, link: whole.length > MAX_LINK ? await packed(bare) : whole };
}

/** A session as text for an address: JSON, deflated, in base64url. */
async function packed(session) {
  const json = new Blob([JSON.stringify(plain(session, false))]);
  const bytes = await through(json, new CompressionStream("deflate-raw"));
  const text = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

export async function unpacked(text) {
  const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  const bytes = Uint8Array.from(binary, (char) => char.charCodeAt(0));
  const json = await through(new Blob([bytes]), new DecompressionStream("deflate-raw"));
  return revived(JSON.parse(new TextDecoder().decode(json)));
}

async function through(blob, transform) {
  return new Uint8Array(await new Response(blob.stream().pipeThrough(transform)).arrayBuffer());
}
