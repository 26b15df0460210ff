// Interventions: all that is served, searched, sorted and paged by the server; uploads by drop.

import { ask } from "./api.js";
import { Details } from "./details.js";
import { classes, html, useEffect, useRef, useState } from "./lib.js";
import { Empty, Icon, Loading, Problem, bytes, number, percent, useGrowing } from "./ui.js";
import { Uploads, take } from "./uploads.js";
import { who } from "./who.js";
import { PLACES, spans, when } from "./wording.js";

const PAGE = 50;
const MOST = 1000; // that the server lists at once
const PAUSE_MS = 200;

/** The columns: each has a heading, what it sorts by, what a row shows, and a class. */
const COLUMNS = [
  ["Name", "name", (entry) => html`<${Name} entry=${entry} />`],
  ["Kind", null, ({ kinds }) => kinds.join(", "), "narrow"],
  ["Layers", null, ({ layers }) => spans(layers), "narrow"],
  ["Positions", null, ({ positions }) => positions.join(", "), "narrow"],
  ["Parameters", "parameters", (entry) => html`${number(entry.parameters)}
    <small>${percent(entry.share)} of the base</small>`, "number narrow"],
  ["Memory", null, (entry) => html`<${Place} entry=${entry} />`, "narrow"],
  ["Size", "size", ({ size_bytes }) => bytes(size_bytes), "number"],
  ["Requests", "requests", (entry) => html`${number(entry.requests)}
    ${entry.in_flight > 0 && html`<small>${entry.in_flight} in flight</small>`}`, "number"],
  ["Changed", "modified", ({ modified }) => modified && when(modified), "number narrow"],
];

const Name = ({ entry }) => html`
  <a href=${`./#/interventions/${entry.id}`}>${entry.id}</a>
  ${entry.manifest.description && html`<span class="about">${entry.manifest.description}</span>`}
  ${entry.problem && html`<span class="about bad">${entry.problem}</span>`}`;

const Place = ({ entry }) => html`
  ${PLACES[entry.tier]}${entry.pinned && html` <span class="count">pinned</span>`}`;

export function Interventions({ base, rest }) {
  const [query, setQuery] = useState("");
  const [sort, setSort] = useState("name");
  const { rows, total, next, problems, error, more, reload } = usePages(query.trim(), sort);
  const [body, grow] = useGrowing(rows?.length);
  const [over, setOver] = useState(false);
  const chooser = useRef();
  const { upload, prefix } = who.value.me;
  useEffect(() => {
    if (!upload) return undefined;
    const dropping = {
      drop: ({ dataTransfer }) => {
        setOver(false);
        take(dataTransfer.files, reload);
      },
      dragover: ({ dataTransfer }) => setOver(dataTransfer.types.includes("Files")),
      dragleave: ({ relatedTarget }) => relatedTarget ?? setOver(false),
    };
    for (const [what, listener] of Object.entries(dropping)) addEventListener(what, listener);
    return () => {
      for (const [what, listener] of Object.entries(dropping)) removeEventListener(what, listener);
    };
  }, [upload]);
  const close = () => (location.hash = "#/interventions");
  return html`
    <div class=${classes("drop", over && "over")}>
      <div class="head">
        <h1>Interventions</h1>
        ${total !== null && html`<span class="muted figure" role="status">
          ${number(total)} ${query.trim() ? "found" : "served"}</span>`}
        <span class="spring"></span>
        <label class="search"><${Icon} name="search" />
          <input type="search" aria-label="Search names and descriptions" placeholder="Search"
            value=${query} onInput=${(event) => setQuery(event.target.value)} /></label>
        ${upload && html`
          <button type="button" class="primary" onClick=${() => chooser.current.click()}>
            <${Icon} name="up" />Upload</button>
          <input ref=${chooser} type="file" multiple hidden accept=".safetensors" aria-label="Files to upload"
            onChange=${(event) => { take(event.target.files, reload); event.target.value = ""; }} />`}
      </div>
      ${upload && prefix && html`<p class="muted own">What you upload is named <code>${prefix}</code> and the file's name.</p>`}
      <${Uploads} reload=${reload} />
      ${error && html`<${Problem} error=${error} retry=${reload} />`}
      ${rows === null && !error && html`<${Loading} what="interventions" />`}
      ${rows?.length === 0 && html`
        <${Empty} title=${query ? "Nothing is found" : upload ? "No intervention is served yet" : "There is none for this key"}>
          <p>${query ? "No name or description has that text." : upload ? "Drop a .safetensors file here, or make one with reft train." : "Those that it may see are named in the server's keys file."}</p>
        <//>`}
      ${rows?.length > 0 && html`
        <${Table} rows=${rows} body=${body} sort=${sort} onSort=${setSort} />
        <div class="after">
          <span class="muted">${number(rows.length)} of ${number(total)}</span>
          ${next && html`<button type="button" onClick=${() => { grow(); more(); }}>Show more</button>`}
        </div>`}
      ${Object.keys(problems).length > 0 && html`
        <details class="panel unserved"><summary>Files that are not served
          <span class="count">${Object.keys(problems).length}</span></summary>
          <dl>${Object.entries(problems).map(([file, why]) => html`<dt key=${file}>${file}</dt><dd>${why}</dd>`)}</dl>
        </details>`}
      ${upload && html`<p class="drop-hint" aria-hidden="true">Drop to upload</p>`}
    </div>
    ${rest && html`<${Details} key=${rest} name=${rest} base=${base} onClose=${close}
      onChange=${reload} />`}`;
}

function Table({ rows, body, sort, onSort }) {
  const by = sort.replace("-", "");
  const down = sort.startsWith("-");
  return html`
    <table class="list">
      <thead><tr>
        ${COLUMNS.map(([heading, key, , style]) => html`
          <th key=${heading} class=${style} scope="col"
            aria-sort=${key && key === by ? (down ? "descending" : "ascending") : null}>
            ${key
              ? html`<button type="button" onClick=${() => onSort(turned(key, sort))}>${heading}
                  <span class="direction" aria-hidden="true">${key === by ? (down ? "↓" : "↑") : ""}</span></button>`
              : heading}
          </th>`)}
      </tr></thead>
      <tbody ref=${body}>
        ${rows.map((entry) => html`
          <tr key=${entry.id}>
            ${COLUMNS.map(([heading, , shown, style]) => html`<td key=${heading} class=${style}>${shown(entry)}</td>`)}
          </tr>`)}
      </tbody>
    </table>`;
}

/** The order after a press on a heading: first names from a, numbers and times from the largest. */
function turned(key, sort) {
  const first = key === "name" ? key : `-${key}`;
  const other = key === "name" ? `-${key}` : key;
  return sort === first ? other : first;
}

/** The pages of a search that were asked for so far, and a way to the next. */
function usePages(query, sort) {
  const [state, setState] = useState({ rows: null, total: null, next: null, problems: {}, error: null });
  const [round, setRound] = useState(0);
  const asked = useRef(0);
  const again = useRef(false); // the same rows, which may have changed
  const load = async (rows, after, limit = PAGE) => {
    const mine = (asked.current += 1);
    const parameters = new URLSearchParams({ limit, sort, ...(query && { q: query }), ...(after && { after }) });
    let found;
    try {
      const { data, total, next, problems } = await ask(`v1/interventions?${parameters}`);
      found = { rows: [...rows, ...data], total, next, problems, error: null };
    } catch (error) {
      found = { error };
    }
    // A late answer to an earlier search is not shown.
    if (mine !== asked.current) return;
    setState((old) => ({ ...old, ...found }));
  };
  useEffect(() => {
    const count = again.current ? Math.min(Math.max(PAGE, state.rows?.length ?? 0), MOST) : PAGE;
    again.current = false;
    const timer = setTimeout(() => load([], null, count), state.rows === null || !query ? 0 : PAUSE_MS);
    return () => clearTimeout(timer);
  }, [query, sort, round]);
  return {
    ...state,
    more: () => load(state.rows, state.next),
    reload: () => {
      again.current = true;
      setRound((old) => old + 1);
    },
  };
}
