// Look inside: what an intervention does to one prompt, row by row, and at a range of strengths.

import { ask } from "./api.js";
import { Text } from "./answer.js";
import { Chart } from "./chart.js";
import { Part } from "./column.js";
import { HeatMap, rowsOf } from "./heatmap.js";
import { html, useEffect } from "./lib.js";
import { Picker } from "./picker.js";
import { blank, distance, fill, measure, pieces, unmeasured } from "./run.js";
import { SAMPLING, part, shown, used } from "./session.js";
import { Store, useStore } from "./store.js";
import { NumberInput, Problem, RunButton, Segmented } from "./ui.js";
import { quoted } from "./wording.js";

const MAX_STRENGTHS = 25;

/** What each kind shows, and how to start it: said before there is anything to show. */
const ABOUT = {
  map: "Press Look to see, by layer and token, how far the intervention moves what the model thinks of the prompt, and how far its answer is from the base model's.",
  fan: "Press Ask to see the answers to the prompt at every strength below each other, with their distance from the base model's and their length as charts.",
};

/** What is looked at, and what was found; `served` is how many interventions there are. It outlives the view. `fan` has a name, a prompt and answers: {strength, answer}. */
const looked = new Store({
  kind: "map", served: null, chosen: null, prompt: "Who are you?", maxTokens: 24, range: { from: -1, to: 2, step: 0.5 },
  trace: null, fan: null, running: null, error: null,
});

const set = (fields) => looked.set(fields);

/** Choose the first intervention that is served, if none was chosen. */
async function choose() {
  try {
    const { data, total } = await ask("v1/interventions?limit=50");
    const names = data.filter(({ problem }) => !problem).map(({ id }) => id);
    set({ error: null, served: total, chosen: names.length ? part(names.includes("pirate") ? "pirate" : names[0]) : null });
  } catch (error) {
    set({ error });
  }
}

/** The longest answer that is asked for: what was typed, or what the tenant may have. */
const longest = ({ maxTokens }) => Math.min(maxTokens, SAMPLING.max_tokens.max);

const bodyOf = (state, base, one) => ({
  ...used({ parts: [one] }, base), messages: [{ role: "user", content: state.prompt }],
  max_tokens: longest(state), temperature: 0,
});

/** Ask for one answer with a trace, then ask the base for the log-probabilities of its tokens. */
async function lookInside(base) {
  const { chosen, prompt } = looked.value;
  const body = bodyOf(looked.value, base, chosen);
  await running(async (signal) => {
    const answer = await ask("v1/chat/completions", {
      method: "POST", signal,
      json: {
        ...body, trace: true, logprobs: true, top_logprobs: 5, return_token_ids: true,
      },
    });
    const [choice] = answer.choices;
    const { content } = choice.logprobs;
    const { prompt_token_ids: ids } = answer;
    const text = choice.message.content ?? choice.message.reasoning_content ?? "";
    const said = {
      ...blank(), running: false, text, prompt: ids, ids: choice.token_ids, pieces: pieces(content, text),
    };
    const [texts] = await measure(looked, base, [said]);
    set({ trace: { ...answer.trace[0], prompt, name: chosen.name, said, texts, from: ids.length } });
  });
}

/** Strengths from a range, both ends included, to three digits. */
function strengths({ from, to, step }) {
  const count = step > 0 && to >= from ? Math.floor((to - from) / step + 1e-9) + 1 : 0;
  return Array.from({ length: count }, (_, i) => Number((from + i * step).toFixed(3)));
}

/** Send the same prompt at every strength of the range, all at once. */
async function spread(base) {
  const { chosen, prompt, range } = looked.value;
  const fan = strengths(range).map((strength) => ({ strength, answer: blank() }));
  set({ fan: { name: chosen.name, prompt, answers: fan } });
  await running(async (signal) => {
    await Promise.all(fan.map(({ strength, answer }) => {
      const body = shown(bodyOf(looked.value, base, { ...chosen, strength }));
      return fill(answer, looked, "v1/chat/completions", body, signal);
    }));
    const answers = unmeasured(fan.map(({ answer }) => answer));
    if (answers.length) await measure(looked, base, answers);
  });
}

async function running(work) {
  const controller = new AbortController();
  set({ running: controller, error: null });
  try {
    await work(controller.signal);
  } catch (error) {
    if (error.name !== "AbortError") set({ error });
  }
  set({ running: null });
}

export function Look({ base }) {
  const state = useStore(looked);
  const { kind, served, chosen, prompt, running: busy, error, trace, fan } = state;
  useEffect(() => {
    if (!chosen) choose();
  }, []);
  const start = (event) => {
    event.preventDefault();
    if (kind === "map") lookInside(base);
    else spread(base);
  };
  const count = strengths(state.range).length;
  const found = kind === "map" ? trace : fan;
  const possible = chosen && prompt.trim() && (kind === "map" || (count > 0 && count <= MAX_STRENGTHS));
  return html`
    <div class="head"><h1>Look inside</h1>
      <${Segmented} label="What to show" value=${kind} onChange=${(value) => set({ kind: value })}
        options=${[["map", "Edits by layer"], ["fan", "Fan of strengths"]]} /></div>
    <form class="panel look" onSubmit=${start}>
      <div class="look-subject">
        ${chosen
          ? html`<${Part} part=${chosen} fixed=${kind === "fan"} onChange=${(fields) => set({ chosen: { ...chosen, ...fields } })} />`
          : served === 0 ? html`<p class="muted">No intervention is served for you to look into.</p>`
          : served && html`<${Picker} label="The intervention to look into" onClose=${() => {}} onLeave=${() => {}}
              onPick=${(name) => set({ chosen: part(name) })} />`}
      </div>
      <label class="field look-prompt">Prompt
        <textarea rows="2" value=${prompt} onInput=${(event) => set({ prompt: event.target.value })}></textarea></label>
      <div class="look-end">
        <${NumberField} label="Max tokens" value=${longest(state)} min="1" max=${Math.min(512, SAMPLING.max_tokens.max)} step="1"
          onChange=${(value) => set({ maxTokens: value })} />
        ${kind === "fan" && html`<${Range} range=${state.range} />`}
        <${RunButton} label=${kind === "map" ? "Look" : `Ask at ${count} strengths`} disabled=${!possible}
          onStop=${busy && (() => busy.abort())} />
      </div>
    </form>
    ${error && html`<${Problem} error=${error} retry=${!chosen && choose} />`}
    <p class=${found ? "unseen" : "muted"} role="status">
      ${busy ? "Answering…" : found ? spoken(found) : !error && ABOUT[kind]}</p>
    ${found && (kind === "map" ? html`<${Inside} trace=${found} />` : html`<${Fan} fan=${found} />`)}`;
}

/** What a screen reader says when there is something to see. */
const spoken = ({ said, answers }) =>
  said ? `Answer: ${said.text}` : answers.map(({ strength, answer }) => `Strength ${strength}: ${answer.text}`).join("\n");

const NumberField = ({ label, value, onChange, ...bounds }) => html`
  <label class="field short">${label}
    <${NumberInput} ...${bounds} value=${value} onChange=${(text) => text !== "" && onChange(Number(text))} />
  </label>`;

const Range = ({ range }) => ["from", "to", "step"].map((end) => html`
  <${NumberField} key=${end} label=${{ from: "From", to: "To", step: "Step" }[end]} value=${range[end]}
    min=${end === "step" ? 0.05 : -2} max="2" step="0.05"
    onChange=${(value) => set({ range: { ...range, [end]: value } })} />`);

function Inside({ trace }) {
  const { said } = trace;
  const nats = said.pieces.map(({ tokens }) => Math.abs(distance(tokens[0]) ?? 0));
  return html`
    <section class="panel stack" aria-label="Edits">
      <h2>How far each edit moved each row</h2>
      <p class="muted">${trace.name}, over ${quoted(trace.prompt)}: length of the change over the row's own, by layer and token.
        The first answer token's distribution is ${trace.kl.toFixed(3)} nats (KL) from the base model's.</p>
      <${HeatMap} rows=${rowsOf(trace.edits)} texts=${trace.texts} from=${trace.from} />
    </section>
    <section class="panel stack" aria-label="Answer">
      <h2>How far the answer is from the base model</h2>
      <${Text} answer=${said} colour="distance" />
      ${nats.length > 1 && html`
        <${Chart} title="Nats from the base, by token of the answer" xs=${nats.map((_, i) => i)}
          series=${[{ name: "distance", values: nats }]} format=${(value) => value.toFixed(2)}
          formatX=${(i) => `token ${i + 1}`} />`}
    </section>`;
}

function Fan({ fan: { name, prompt, answers: fan } }) {
  const xs = fan.map(({ strength }) => strength);
  const length = fan.map(({ answer }) => answer.ids.length || null);
  const means = fan.map(({ answer }) => mean(answer.pieces.flatMap(({ tokens }) => tokens).map(distance)));
  const formatX = (strength) => `strength ${strength}`;
  return html`
    <p class="muted asked-of">${name}, over ${quoted(prompt)}</p>
    <div class="charts two">
      <${Chart} title="Mean distance from the base" xs=${xs} format=${(value) => `${value.toFixed(2)} nats`}
        formatX=${formatX} series=${[{ name: "distance", values: means }]} />
      <${Chart} title="Length of the answer" xs=${xs} format=${(value) => `${Math.round(value)} tokens`}
        formatX=${formatX} series=${[{ name: "length", values: length }]} />
    </div>
    <ol class="fan" aria-label="Answers by strength">
      ${fan.map(({ strength, answer }) => html`
        <li key=${strength} aria-busy=${answer.running}>
          <strong class="figure">${strength.toFixed(2)}</strong>
          <div><p class="text">${answer.text}${answer.running && html`<span class="cursor" aria-hidden="true"></span>`}</p>
            ${answer.error && html`<${Problem} error=${answer.error} />`}</div>
        </li>`)}
    </ol>`;
}

function mean(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + Math.abs(value), 0) / known.length : null;
}
