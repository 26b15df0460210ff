// What one column applies: interventions with strengths and directions, or nothing, the base.

import { ask } from "./api.js";
import { change, comparison } from "./comparison.js";
import { html, useState } from "./lib.js";
import { Choose } from "./picker.js";
import { STRENGTH, column as newColumn, part } from "./session.js";
import { Icon, IconButton, Problem, useLoaded } from "./ui.js";

const LETTERS = "ABCD";

export function ColumnCard({ c, column, session, base, busy }) {
  const { columns, turns } = session;
  const setParts = (parts) =>
    change({ columns: columns.map((one, i) => (i === c ? { ...one, parts } : one)) });
  const setPart = (i, fields) =>
    setParts(column.parts.map((one, j) => (i === j ? { ...one, ...fields } : one)));
  const remove = () => {
    const without = (list) => list.filter((_, i) => i !== c);
    change({
      columns: without(columns),
      turns: turns.map((turn) => ({ ...turn, answers: without(turn.answers) })),
    });
  };
  return html`
    <section class="card" aria-label=${`Column ${LETTERS[c]}`}>
      <header>
        <span class="letter" aria-hidden="true">${LETTERS[c]}</span>
        <h2>${kind(column)}</h2>
        <span class="card-actions">
          <${IconButton} icon="code" label=${`Paste a request into column ${LETTERS[c]}`}
            disabled=${busy} onClick=${() => comparison.set({ dialog: { kind: "paste", c } })} />
          ${columns.length > 1 && html`
            <${IconButton} icon="close" label=${`Remove column ${LETTERS[c]}`} disabled=${busy}
              onClick=${remove} />`}
        </span>
      </header>
      ${column.parts.length === 0 && html`<p class="muted base-name">${base}, as it is</p>`}
      ${column.parts.map((one, i) => html`
        <${Part} key=${i} part=${one} alone=${column.parts.length === 1} onChange=${(fields) => setPart(i, fields)}
          onRemove=${() => setParts(column.parts.filter((_, j) => j !== i))} />`)}
      <${Choose} label="Add an intervention" class="quiet add"
        onPick=${(name) => setParts([...column.parts, part(name)])}>
        <${Icon} name="plus" />${column.parts.length ? "Compose with another" : "Add an intervention"}
      <//>
    </section>`;
}

function kind({ parts }) {
  if (!parts.length) return "Base model";
  return parts.length === 1 ? "Intervention" : "Composition";
}

export const AddColumn = ({ busy, onAdd }) => html`
  <${Choose} label="The new column's intervention" first="Base model" class="quiet" disabled=${busy}
    onPick=${(name) => onAdd(name === null ? newColumn() : newColumn(name))}>
    <${Icon} name="plus" />Column<//>`;

/** One intervention. `alone`: no other is composed with it; `fixed`: its strength is not chosen here. */
export function Part({ part: one, alone, fixed = false, onChange, onRemove }) {
  const [open, setOpen] = useState(false);
  const { name, strength, directions } = one;
  const id = `strength-${name}`;
  const pick = (other) => {
    if (other === null) onRemove();
    else onChange({ name: other, directions: null });
  };
  return html`
    <div class="part">
      <div class="part-name">
        <${Choose} label="Another intervention" first=${alone && "Base model"} onPick=${pick}
          class="name" title="Choose another">${name}<${Icon} name="chevron" /><//>
        ${!alone && onRemove && html`
          <${IconButton} icon="close" label=${`Take ${name} out`} onClick=${onRemove} />`}
      </div>
      ${!fixed && html`<div class="strength">
        <input type="range" id=${id} ...${STRENGTH} value=${strength}
          aria-label=${`Strength of ${name}`}
          onInput=${(event) => onChange({ strength: Number(event.target.value) })} />
        <output class="figure" for=${id}>${strength.toFixed(2)}</output>
        <${IconButton} icon="reset" label=${`Strength of ${name} back to 1`} disabled=${strength === 1}
          onClick=${() => onChange({ strength: 1 })} />
      </div>`}
      <details class="directions" onToggle=${(event) => setOpen(event.target.open)}>
        <summary>Directions${directions && html` <span class="count">${directions.length}</span>`}</summary>
        ${open && html`<${Directions} name=${name} directions=${directions} onChange=${onChange} />`}
      </details>
    </div>`;
}

function Directions({ name, directions, onChange }) {
  const { data, error } = useLoaded((signal) => ask(`v1/interventions/${encodeURIComponent(name)}`, { signal }), [name]);
  if (error) return html`<${Problem} error=${error} />`;
  if (!data) return null;
  const all = Array.from({ length: data.directions }, (_, i) => i);
  const on = directions ?? all;
  const toggle = (i) => {
    const chosen = on.includes(i) ? on.filter((other) => other !== i) : [...on, i].sort((a, b) => a - b);
    onChange({ directions: chosen.length === all.length ? null : chosen });
  };
  return html`
    <div class="toggles" role="group" aria-label=${`Directions of ${name}`}>
      ${all.map((i) => html`
        <button type="button" key=${i} aria-pressed=${on.includes(i)} onClick=${() => toggle(i)}
          disabled=${on.length === 1 && on.includes(i)}>${i}</button>`)}
    </div>`;
}
