// Answering: a request for each column, all started at once, their tokens gathered as they come.
// Measuring: what the base model thinks of the same tokens, asked for all answers in one request.

import { ApiError, ask, stream } from "./api.js";
import { classified } from "./labels.js";
import { requestOf, shown, title } from "./session.js";

/**
 * An answer that has not begun. Tokens are {text, logprob, top: [{text, logprob}], base}, base being
 * the log-probability that the base model gives it there, once that is measured; pieces are {text,
 * tokens}, for a character may be made of several tokens. `labels` are {label, prob} where the
 * column's interventions name labels, else null. `prompt` and `ids` are token ids. `thought` is what
 * the model thought before its text; its tokens are a piece without a text. `of` is the title of
 * what is asked, which stays when the column applies something else afterwards. `stage` is how far its
 * request is: null before it is sent, "sent", or "taken" by the server.
 */
export const blank = (of = null) => ({
  of, thought: "", text: "", pieces: [], waiting: [], prompt: [], ids: [],
  finish: null, error: null, figures: null, labels: null, running: true, stage: null,
});

/** Answer turn `t` in the columns `which`; ends when all have ended, also those that failed. */
export async function answer(store, base, t, which) {
  const { session } = store.value;
  const controller = new AbortController();
  const turn = session.turns[t];
  for (const c of which) turn.answers[c] = blank(title(session.columns[c]));
  store.set({ running: controller, problem: null });
  await Promise.all(
    which.map(async (c) => {
      const { path, body } = requestOf(session, base, c, t);
      const { signal } = controller;
      const filled = fill(turn.answers[c], store, path, shown(body), signal);
      turn.answers[c].labels = await classified(session.columns[c], base, body, signal);
      store.touched();
      return filled;
    }),
  );
  store.set({ running: null });
}

/** Stream the answer to one request into `answer`, which also keeps an error. */
export async function fill(answer, store, path, body, signal) {
  let began = null;
  let first = null;
  let last = null;
  let usage = null;
  const reached = (stage) => {
    answer.stage = stage;
    if (stage === "sent") began = performance.now();
    store.touched();
  };
  try {
    for await (const event of stream(path, body, signal, reached)) {
      usage = event.usage ?? usage;
      const [choice] = event.choices;
      if (!choice) continue;
      const prompt = event.prompt_token_ids ?? choice.prompt_token_ids;
      if (prompt) answer.prompt = prompt;
      answer.ids.push(...(choice.token_ids ?? []));
      grow(answer, choice.delta?.content ?? choice.text ?? "", tokens(choice.logprobs));
      think(answer, choice.delta?.reasoning_content ?? "");
      answer.finish = choice.finish_reason ?? answer.finish;
      if (answer.ids.length) {
        last = performance.now();
        first ??= last;
      }
      answer.figures = figures(answer, usage, began, first, last);
      store.touched();
    }
    answer.figures = figures(answer, usage, began, first, last);
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else answer.error = said(error);
  }
  answer.running = false;
  store.touched();
}

/** Add to what the model thinks. */
function think(answer, text) {
  if (!text) return;
  answer.thought += text;
  answer.pieces.push({ text: "", tokens: answer.waiting });
  answer.waiting = [];
}

/** Add new text and its tokens: a piece for each token if their texts are whole, else one piece. */
function grow(answer, text, came) {
  answer.waiting.push(...came);
  if (!text) return;
  answer.text += text;
  const whole = answer.waiting.map((token) => token.text).join("") === text;
  if (whole) answer.pieces.push(...answer.waiting.map((token) => ({ text: token.text, tokens: [token] })));
  else answer.pieces.push({ text, tokens: answer.waiting });
  answer.waiting = [];
}

/** The tokens of chat's or completions' log-probabilities, in one shape. */
function tokens(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs }) => ({
      text: token, logprob, top: top_logprobs.map((one) => ({ text: one.token, logprob: one.logprob })),
    }));
  }
  return logprobs.tokens.map((text, i) => ({
    text,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i] ?? {})
      .map(([other, logprob]) => ({ text: other, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

/** Tokens of a whole chat answer as pieces of its text, without the tokens that ended it. */
export function pieces(content, text) {
  const found = [];
  let bytes = [];
  let waiting = [];
  for (const [i, token] of tokens({ content }).entries()) {
    bytes.push(...content[i].bytes);
    waiting.push(token);
    const whole = decoded(bytes);
    if (whole === null) continue;
    found.push({ text: whole, tokens: waiting });
    bytes = [];
    waiting = [];
  }
  const length = () => found.reduce((sum, piece) => sum + piece.text.length, 0);
  while (length() > text.length && !text.endsWith(found.at(-1).text)) found.pop();
  return found;
}

/** The text of UTF-8 bytes; null if a character is not complete. */
function decoded(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(bytes));
  } catch {
    return null;
  }
}

/** Answers whose tokens the base was not asked about yet. */
export const unmeasured = (answers) =>
  answers.filter((answer) => answer && !answer.running && answer.ids.length && !answer.measured);

/**
 * Ask the base model how probable it finds the tokens of these answers, each after its own prompt.
 * Gives the texts of each answer's tokens, those of its prompt first.
 */
export async function measure(store, base, answers) {
  const mark = (measured) => answers.forEach((answer) => (answer.measured = measured));
  mark(true);
  const { choices } = await ask("v1/completions", {
    method: "POST",
    json: {
      model: base,
      prompt: answers.map(({ prompt, ids }) => [...prompt, ...ids]),
      max_tokens: 0, echo: true, logprobs: 0, temperature: 0,
    },
  }).catch((error) => {
    mark(false);
    throw error;
  });
  for (const { index, logprobs } of choices) {
    const { pieces, prompt } = answers[index];
    const values = logprobs.token_logprobs.slice(prompt.length);
    pieces.flatMap(({ tokens }) => tokens).forEach((token, i) => (token.base = values[i]));
    answers[index].pieces = [...pieces]; // they are drawn anew
  }
  store.touched();
  return choices.map(({ logprobs }) => logprobs.tokens);
}

/** By how many nats the edits moved a token; null where that was not measured. */
export const distance = ({ logprob, base }) => (base == null ? null : logprob - base);

function figures(answer, usage, began, first, last) {
  const count = usage?.completion_tokens ?? answer.ids.length;
  const seconds = first === null ? 0 : (last - first) / 1000;
  return {
    tokens: count,
    first: first === null ? null : (first - began) / 1000,
    rate: count > 1 && seconds > 0 ? (count - 1) / seconds : null,
    prompt: usage?.prompt_tokens ?? null,
    cached: usage?.prompt_tokens_details?.cached_tokens ?? null,
  };
}

function said(error) {
  if (error instanceof ApiError) {
    return { message: error.message, param: error.param, status: error.status, again: error.again };
  }
  return { message: "The answer broke off.", param: null, status: 0 };
}
