// Lines over time or another number: an SVG that takes its colours from the page's own.

import { html, useState } from "./lib.js";

const WIDTH = 600;
const HEIGHT = 150;

/** A round number not below `value`. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((bound) => bound >= value * 0.999);
}

/**
 * A line chart. `xs` are ascending numbers; a series is {name, values} with null where nothing is known.
 * `format` writes a value, `formatX` a place; `max` fixes the top of the scale.
 */
export function Chart({ title, xs, series, format, formatX, max }) {
  const [at, setAt] = useState(null);
  const known = series.flatMap(({ values }) => values.filter((value) => value !== null));
  const most = Math.max(...known, 0);
  const top = max ?? (most > 0 ? roundUp(most) : 1);
  const span = xs.at(-1) - xs[0];
  // A single value lies at the end, where the newest will.
  const x = (i) => (span > 0 ? ((xs[i] - xs[0]) / span) * WIDTH : WIDTH - 1);
  const y = (value) => HEIGHT - (Math.min(value, top) / top) * HEIGHT;
  const shown = at === null || at >= xs.length ? xs.length - 1 : at;
  const values = series.map(({ values: all }) => all[shown] ?? null);
  const move = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const place = xs[0] + ((event.clientX - box.left) / box.width) * span;
    setAt(xs.reduce((best, value, i) => (Math.abs(value - place) < Math.abs(xs[best] - place) ? i : best), 0));
  };
  const said = series.map(({ name }, i) => `${name} ${values[i] === null ? "unknown" : format(values[i])}`);
  return html`
    <figure class="chart">
      <figcaption>
        <h2>${title}</h2>
        <ul>
          ${series.map(({ name }, i) => html`
            <li key=${name}><i class=${`line-${i}`}></i>${name}
              <strong class="figure">${values[i] === null ? "–" : format(values[i])}</strong></li>`)}
        </ul>
      </figcaption>
      <div class="plot">
        <span class="top-mark" aria-hidden="true">${known.length ? format(top) : "nothing yet"}</span>
        <svg viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img"
          aria-label=${`${title}: ${said.join(", ")}`} onMouseMove=${move} onMouseLeave=${() => setAt(null)}>
          ${[0, 0.5, 1].map((share) => html`
            <line key=${share} class="grid" x1="0" x2=${WIDTH} y1=${HEIGHT * share} y2=${HEIGHT * share} />`)}
          ${series.map(({ name, values: all }, i) => html`
            <path key=${name} class=${`line-${i}`} d=${line(all, x, y)} />`)}
          ${at !== null && html`<line class="at" x1=${x(shown)} x2=${x(shown)} y1="0" y2=${HEIGHT} />`}
        </svg>
        <span class="ends" aria-hidden="true">
          <span>${xs.length > 1 && formatX(xs[0])}</span>${at !== null && html`<strong>${formatX(xs[shown])}</strong>`}
          <span>${formatX(xs.at(-1))}</span></span>
      </div>
    </figure>`;
}

/** The path through all values that are known. */
function line(values, x, y) {
  return values
    .map((value, i) => (value === null ? "" : `${x(i).toFixed(1)},${y(value).toFixed(1)}`))
    .filter(Boolean)
    .map((point, i, all) => `${i ? "L" : "M"}${point}${all.length === 1 ? "h1" : ""}`)
    .join("");
}
