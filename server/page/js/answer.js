// One answer of one column: its tokens, coloured; what else the model considered; its figures.

import { comparison } from "./comparison.js";
import { Labels } from "./labels.js";
import { classes, html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./lib.js";
import { distance } from "./run.js";
import { CopyButton, IconButton, Problem, seconds } from "./ui.js";

/** Tokens of a block of an answer's text, at least. */
const BLOCK = 64;

/** Bounds of the five colour classes: probabilities downwards, distances (nats) upwards. */
const PROBABILITIES = [0.8, 0.5, 0.2, 0.05];
const DISTANCES = [0.1, 0.5, 1.5, 4];

/** The colour class of a piece: that of its least expected token. */
function shade({ tokens }, colour) {
  if (colour === "probability") {
    const least = Math.exp(Math.min(...tokens.map(({ logprob }) => logprob)));
    const level = PROBABILITIES.findIndex((bound) => least >= bound);
    return `p${level < 0 ? 4 : level}`;
  }
  const moved = tokens.map(distance).filter((nats) => nats !== null);
  if (!moved.length) return "";
  const most = Math.max(...moved.map(Math.abs));
  const level = DISTANCES.findIndex((bound) => most < bound);
  return `d${level < 0 ? 4 : level}`;
}

/** One answer, headed by the title that gave it (`answer.of`), else by `name`, the column's title. */
export function Answer({ answer, name, c, t, colour, busy, last, onAnswer }) {
  return html`
    <section class="answer" aria-label=${`Answer of ${answer?.of ?? name}`} aria-busy=${answer?.running ?? false}>
      <h3 class="answer-name">${answer?.of ?? name}</h3>
      ${!answer
        ? html`<p class="muted">Not asked yet.</p>`
        : html`
          ${answer.thought && html`
            <details class="thought" open=${!answer.text}><summary>Thinking</summary><p>${answer.thought}</p></details>`}
          <${Text} answer=${answer} colour=${colour} />
          ${answer.labels && html`<${Labels} labels=${answer.labels} name=${answer.of ?? name} />`}
          ${answer.error && html`<${Problem} error=${answer.error} />`}`}
      <footer>
        <${Figures} answer=${answer} />
        <span class="answer-actions">
          ${(last || !answer) && html`<${IconButton} icon="reset" disabled=${busy}
            label=${answer ? `Answer again: ${name}` : `Answer: ${name}`} onClick=${onAnswer} />`}
          ${answer?.text && html`
            <${CopyButton} small label=${`Copy the answer of ${name}`} text=${() => answer.text} />`}
          <${IconButton} icon="code" label=${`The request of ${name}, as curl, Python or JSON`}
            onClick=${() => comparison.set({ dialog: { kind: "copy", c, t } })} />
        </span>
      </footer>
    </section>`;
}

/**
 * The text of an answer, in tokens; below it what else was likely in the place of the one that is picked.
 * A screen reader reads it as text, but for the one token that Tab comes to, which is a button.
 */
export function Text({ answer, colour }) {
  const { pieces, text, running } = answer;
  const [at, setAt] = useState(null); // where Tab comes to
  const [picked, setPicked] = useState(null);
  useEffect(() => {
    setAt(null);
    setPicked(null);
  }, [answer]);
  const paragraph = useRef();
  const going = useRef(false);
  const go = (i) => {
    going.current = true;
    setAt(i);
  };
  useLayoutEffect(() => {
    if (going.current) paragraph.current.querySelector("[role=button]").focus();
    going.current = false;
  });
  const whole = useMemo(() => [], [pieces, colour, at, picked]); // blocks that do not grow any more
  const cursor = running && html`<span class="cursor" aria-hidden="true"></span>`;
  if (colour === "none" || !pieces.length) return html`<p class="text">${text}${cursor}</p>`;
  const place = at ?? pieces.findIndex((piece) => piece.text);
  const pick = ({ target }) => {
    const token = target.closest(".token");
    if (!token) return;
    const i = Number(token.dataset.place);
    go(i);
    setPicked(i === picked ? null : i);
  };
  const close = () => {
    go(picked);
    setPicked(null);
  };
  const keys = (event) => {
    const { key } = event;
    const next = { ArrowRight: following(pieces, place, 1), ArrowLeft: following(pieces, place, -1) }[key];
    if (next !== undefined) go(next);
    else if (key === "Enter" || key === " ") pick(event);
    else if (key === "Escape") setPicked(null);
    else return;
    event.preventDefault();
  };
  const drawn = (piece, i) => piece.text && html`
    <span key=${i} data-place=${i} ...${i === place && asButton(piece, i === picked)}
      class=${classes("token", i === picked && "picked", piece.tokens.length && shade(piece, colour))}
      >${piece.text}</span>`;
  const ends = blocks(pieces);
  const block = (b) => {
    const from = ends[b - 1] ?? 0;
    const last = b === ends.length - 1;
    return html`<span class="block" key=${b}>
      ${pieces.slice(from, ends[b]).map((piece, i) => drawn(piece, from + i))}${last && cursor}</span>`;
  };
  return html`
    <p class="text" ref=${paragraph} onClick=${pick} onKeyDown=${keys}>
      ${ends.map((_, b) => (b < ends.length - 1 ? (whole[b] ??= block(b)) : block(b)))}
    </p>
    ${pieces[picked]?.tokens.map((token, i) => html`<${Alternatives} key=${i} token=${token} onClose=${close} />`)}`;
}

const asButton = ({ text }, pressed) => ({
  role: "button", tabindex: 0, "aria-pressed": pressed,
  "aria-label": text.trim() ? null : text.includes("\n") ? "line break" : "space",
});

/**
 * Where blocks of whole lines end among the pieces. Only the last one grows, and is drawn and laid out
 * anew; those that nobody sees are not laid out.
 */
function blocks(pieces) {
  const ends = [];
  let from = 0;
  pieces.forEach(({ text }, i) => {
    if (i - from < BLOCK || !text.endsWith("\n")) return;
    from = i + 1;
    ends.push(from);
  });
  return from < pieces.length ? [...ends, pieces.length] : ends;
}

/** The next place, by `step`, of a piece with a text; undefined if there is none. */
function following(pieces, place, step) {
  let next = place + step;
  while (pieces[next]?.text === "") next += step;
  return pieces[next] && next;
}

const Alternatives = ({ token, onClose }) => html`
  <div class="alternatives" role="region" aria-label="Alternatives"
    onKeyDown=${(event) => event.key === "Escape" && onClose()}>
    <header>
      <span>Instead of <code>${visibleText(token.text)}</code></span>
      <${IconButton} icon="close" label="Close the alternatives" onClick=${onClose} />
    </header>
    <ol>
      ${token.top.map(({ text, logprob }) => html`
        <li key=${text} class=${classes(text === token.text && "chosen")}>
          <code>${visibleText(text)}</code>
          <meter min="0" max="1" value=${Math.exp(logprob)} aria-label="Probability"></meter>
          <span class="figure">${(Math.exp(logprob) * 100).toFixed(1)} %</span>
        </li>`)}
    </ol>
    ${token.base != null && html`
      <p class="muted">The base model gives it ${(Math.exp(token.base) * 100).toFixed(1)} %: ${distance(token).toFixed(2)} nats between them.</p>`}
  </div>`;

const visibleText = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵");

/** What an answer without a token waits for, by its stage. */
const WAITS = {
  null: ["waits until another has ended", "So many requests at a time the key may have"],
  sent: ["waits for a connection", "A browser has six to a server, those of other tabs included"],
  taken: ["waits for its first token", "The server has the request"],
};

function Figures({ answer }) {
  const figures = answer?.figures;
  if (answer?.running && !figures?.tokens) {
    const [what, why] = WAITS[answer.stage];
    return html`<p class="figures waits" title=${why}>${what}</p>`;
  }
  if (!figures) return html`<p class="figures"></p>`;
  const { tokens, first, rate, prompt, cached } = figures;
  const finish = { length: "cut at max tokens", stopped: "stopped" }[answer.finish];
  return html`
    <p class="figures">
      <span>${tokens} tokens</span>
      ${first !== null && html`<span title="Time to the first token">first ${seconds(first)}</span>`}
      ${rate !== null && html`<span title="Tokens a second">${rate.toFixed(1)} tok/s</span>`}
      ${cached !== null && html`<span title="Prompt tokens that the prefix cache had">${cached} of ${prompt} cached</span>`}
      ${finish && html`<span>${finish}</span>`}
    </p>`;
}
