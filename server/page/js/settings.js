// How tokens are picked, for all columns alike.

import { html } from "./lib.js";
import { SAMPLING } from "./session.js";
import { NumberInput } from "./ui.js";

/** How many settings differ from those of a new comparison. */
export function changed({ sampling, stop, system }) {
  const differ = Object.entries(SAMPLING).filter(([name, { value }]) => sampling[name] !== value);
  return differ.length + (stop ? 1 : 0) + (system ? 1 : 0);
}

export function Settings({ session, change }) {
  const { sampling, mode, system, stop } = session;
  const set = (name, text) => {
    const value = text === "" ? SAMPLING[name].value : Number(text);
    if (!Number.isNaN(value)) change({ sampling: { ...sampling, [name]: value } });
  };
  return html`
    <section class="settings panel" aria-label="Settings">
      <div class="fields">
        ${Object.entries(SAMPLING).map(([name, { label, value, min, max, step }]) => html`
          <label class="field" key=${name}>${label}
            <${NumberInput} min=${min} max=${max} step=${step} value=${sampling[name]}
              placeholder=${value === null ? "random" : value} onChange=${(text) => set(name, text)} />
          </label>`)}
      </div>
      <div class="fields wide">
        ${mode === "chat" && html`
          <label class="field">System message
            <textarea rows="2" value=${system}
              onInput=${(event) => change({ system: event.target.value })}></textarea>
          </label>`}
        <label class="field">Stop texts, one a line
          <textarea rows="2" value=${stop}
            onInput=${(event) => change({ stop: event.target.value })}></textarea>
        </label>
      </div>
    </section>`;
}
