// Labels: which interventions name some, how likely each is after a prompt, and the bars that show it.

import { ask } from "./api.js";
import { classes, html } from "./lib.js";
import { used } from "./session.js";

const SHOWN = 8;

/** Whether an intervention's file names labels, by name, as far as a listing or an entry said so. */
const known = new Map();

/** Remember what entries of a listing say of labels. */
export function note(entries) {
  for (const { id, manifest } of entries) known.set(id, Boolean(manifest.labels));
}

/** Whether any of a column's interventions names labels; asks the server about names not seen yet. */
async function labelled({ parts }, signal) {
  const names = parts.map(({ name }) => name.split("@")[0]);
  for (const name of names.filter((one) => !known.has(one))) {
    note([await ask(`v1/interventions/${encodeURIComponent(name)}`, { signal })]);
  }
  return names.some((name) => known.get(name));
}

/**
 * The labels of a request's prompt, each {label, prob}, in the order of the file; null where the
 * column's interventions name none, or different ones.
 */
export async function classified(column, base, { messages, prompt }, signal) {
  try {
    if (!(await labelled(column, signal))) return null;
    const asked = messages ? { messages } : { input: prompt };
    const json = { ...used(column, base), ...asked };
    const { labels, data } = await ask("v1/classify", { method: "POST", json, signal });
    return labels.map((label, i) => ({ label, prob: data[0].probs[i] }));
  } catch {
    return null; // what is wrong with the request, its answer says as well
  }
}

/** The likeliest labels as bars. */
export function Labels({ labels, name }) {
  const best = [...labels].sort((a, b) => b.prob - a.prob);
  return html`
    <ol class="labels" aria-label=${`Labels of ${name}`}>
      ${best.slice(0, SHOWN).map(({ label, prob }, i) => html`
        <li key=${label} class=${classes(i === 0 && "chosen")}>
          <span>${label}</span>
          <meter min="0" max="1" value=${prob} aria-label=${`Probability of ${label}`}></meter>
          <span class="figure">${(prob * 100).toFixed(1)} %</span>
        </li>`)}
      ${best.length > SHOWN && html`<li class="muted">${best.length - SHOWN} more are less likely</li>`}
    </ol>`;
}
