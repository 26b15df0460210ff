// Answering: a request for each column, all started at once, their tokens gathered as they come.

import { ApiError, stream } from "./api.js";
import { requestOf, shown } from "./session.js";

/**
 * An answer that has not begun. Tokens are {text, logprob, top: [{text, logprob}], distance};
 * pieces are {text, tokens}, for a character may be made of several tokens.
 */
const blank = () => ({
  text: "", pieces: [], tokens: [], waiting: [], finish: null, error: null, figures: null, running: true,
});

/** Answer turn `t` in the columns `which`; ends when all have, however they did. */
export async function answer(store, base, t, which) {
  const { session } = store.value;
  const controller = new AbortController();
  const turn = session.turns[t];
  for (const c of which) turn.answers[c] = blank();
  store.set({ running: controller });
  const began = performance.now();
  await Promise.all(
    which.map((c) => {
      const { path, body } = requestOf(session, base, c, t);
      const distance = session.colour === "distance";
      const json = shown(body, { distance });
      return fill(turn.answers[c], store, path, json, controller.signal, began);
    }),
  );
  store.set({ running: null });
}

async function fill(answer, store, path, body, signal, began) {
  let first = null;
  let last = began;
  let usage = null;
  try {
    for await (const event of stream(path, body, signal)) {
      usage = event.usage ?? usage;
      attach(answer, event.trace);
      const [choice] = event.choices;
      if (!choice) continue;
      grow(answer, choice.delta?.content ?? choice.text ?? "", tokens(choice.logprobs));
      answer.finish = choice.finish_reason ?? answer.finish;
      if (answer.tokens.length) {
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

/** Text that came, with the tokens that made it: a piece each, where their texts are whole. */
function grow(answer, text, came) {
  answer.tokens.push(...came);
  answer.waiting.push(...came);
  if (!text) return;
  answer.text += text;
  const whole = answer.waiting.map((token) => token.text).join("") === text;
  if (whole) answer.pieces.push(...answer.waiting.map((token) => ({ text: token.text, tokens: [token] })));
  else answer.pieces.push({ text, tokens: answer.waiting });
  answer.waiting = [];
}

/** Both shapes of log-probabilities, chat's and completions', as tokens of one. */
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

function attach(answer, trace) {
  void answer;
  void trace;
}

function figures(answer, usage, began, first, last) {
  const count = usage?.completion_tokens ?? answer.tokens.length;
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
    return { message: error.message, param: error.param, status: error.status };
  }
  return { message: "The answer broke off.", param: null, status: 0 };
}
