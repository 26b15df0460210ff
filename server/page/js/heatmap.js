// A heat map as a table: a row for each layer and component, a column for each token.

import { html } from "./lib.js";

const LEVELS = 8;

/** Edits of a trace as [label, size by position], the deepest layer first. */
export function rowsOf(edits) {
  const rows = new Map();
  for (const { layer, component, position, relative_size: size } of edits) {
    const place = `${layer} ${component}`;
    if (!rows.has(place)) rows.set(place, { layer, component, sizes: new Map() });
    const { sizes } = rows.get(place);
    sizes.set(position, Math.max(size, sizes.get(position) ?? 0));
  }
  return [...rows.values()].sort((a, b) => b.layer - a.layer);
}

/** A trace as a heat map. `texts` are those of all tokens; the answer's begin at position `from`. */
export function HeatMap({ rows, texts, from }) {
  if (!rows.length) return html`<p class="muted">No row was edited.</p>`;
  const most = Math.max(...rows.flatMap(({ sizes }) => [...sizes.values()]));
  const last = Math.max(from, ...rows.flatMap(({ sizes }) => [...sizes.keys()].map((place) => place + 1)));
  const places = texts.slice(0, last);
  const components = new Set(rows.map(({ component }) => component));
  const label = ({ layer, component }) => (components.size > 1 ? `${layer} ${component}` : `${layer}`);
  return html`
    <div class="heat-scroll" tabindex="0" role="group" aria-label="Heat map">
      <table class="heat">
        <thead><tr><th scope="col">Layer</th>
          ${places.map((text, i) => html`
            <th key=${i} scope="col" class=${i >= from ? "answer-token" : ""}><span>${visible(text)}</span></th>`)}
        </tr></thead>
        <tbody>
          ${rows.map((row) => html`
            <tr key=${label(row)}><th scope="row">${label(row)}</th>
              ${places.map((text, i) => html`<${Cell} key=${i} size=${row.sizes.get(i)} most=${most}
                place=${`layer ${label(row)}, token ${i} ${visible(text)}`} />`)}
            </tr>`)}
        </tbody>
      </table>
    </div>
    <p class="legend">0 ${Array.from({ length: LEVELS + 1 }, (_, n) => html`<i key=${n} class=${`h${n}`}></i>`)}
      ${most.toPrecision(2)} of the row's length</p>`;
}

function Cell({ size, most, place }) {
  if (size === undefined) return html`<td></td>`;
  const level = Math.round((size / most) * LEVELS);
  return html`<td class=${`h${level}`} title=${`${place}: ${size.toPrecision(3)}`}>
    <span class="unseen">${size.toPrecision(2)}</span></td>`;
}

/** A token's text without the spaces around it; those of one that is nothing else are drawn. */
const visible = (text) => text.replaceAll("\n", "↵").trim() || text.replaceAll(/\s/g, "␣");
