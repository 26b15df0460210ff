// Usage: what tenants have used, by day, tenant or intervention, as a table with a bar for each row.

import { ask } from "./api.js";
import { html, useState } from "./lib.js";
import { Loading, Problem, Segmented, number, useGrowing, useLoaded } from "./ui.js";
import { when } from "./wording.js";

const PERIODS = [[7, "7 days"], [30, "30 days"]];
const GROUPS = [["day", "By day"], ["tenant", "By tenant"], ["intervention", "By intervention"]];
const SHOWN = 50;
const DAY_MS = 86_400_000;

/** The last `count` UTC days as YYYY-MM-DD, today first. */
const lastDays = (count) =>
  Array.from({ length: count }, (_, i) => new Date(Date.now() - i * DAY_MS).toISOString().slice(0, 10));

/** `own` where the server tells of one tenant alone. */
export function Usage({ own = false }) {
  const [period, setPeriod] = useState(7);
  const [group, setGroup] = useState("day");
  const [tenant, setTenant] = useState(null);
  const days = lastDays(period);
  const asked = new URLSearchParams({
    from: days.at(-1), to: days[0], group_by: group, ...(tenant && { tenant }),
  });
  const path = `v1/usage?${asked}`;
  const { data: found, error, reload } = useLoaded(async (signal) => ({ path, ...(await ask(path, { signal })) }), [path]);
  const only = (name) => {
    setTenant(name);
    setGroup("intervention");
  };
  const groups = tenant || own ? GROUPS.filter(([name]) => name !== "tenant") : GROUPS;
  return html`
    <div class="toolbar">
      <${Segmented} label="Period" value=${period} options=${PERIODS} onChange=${setPeriod} />
      <${Segmented} label="Rows" value=${group} options=${groups} onChange=${setGroup} />
      ${tenant && html`<button type="button" onClick=${() => setTenant(null)}>Tenant ${tenant}: show all</button>`}
    </div>
    ${error && html`<${Problem} error=${error} retry=${reload} />`}
    ${!error && found?.path !== path && html`<${Loading} what="what was used" />`}
    ${!error && found?.path === path && html`
      ${found.problem && html`<${Problem} error=${{ message: found.problem }} />`}
      <${Table} key=${path} group=${group} rows=${ordered(found.data, group, days)} total=${found.total} onTenant=${only} />
      <${Notes} found=${found} />`}`;
}

/** Every day of the period, the last first; tenants and interventions by their tokens, most first. */
function ordered(rows, group, days) {
  if (group !== "day") return [...rows].sort((a, b) => tokens(b) - tokens(a));
  const known = new Map(rows.map((row) => [row.day, row]));
  const nothing = { requests: 0, prompt_tokens: 0, cached_tokens: 0, completion_tokens: 0 };
  return days.map((day) => known.get(day) ?? { day, ...nothing });
}

const tokens = (row) => row.prompt_tokens + row.completion_tokens;

const HEADINGS = { day: "Day (UTC)", tenant: "Tenant", intervention: "Intervention" };

function Table({ group, rows, total, onTenant }) {
  const [count, setCount] = useState(SHOWN);
  const [body, grow] = useGrowing(count);
  if (!rows.length) return html`<p class="panel muted">Nothing was used in these days.</p>`;
  const most = Math.max(...rows.map(tokens), 1);
  return html`
    <div class="used-scroll" tabindex="0" role="group" aria-label="What was used">
    <table class="list used">
      <thead><tr>
        <th scope="col">${HEADINGS[group]}</th>
        <th scope="col" class="wide">Tokens</th>
        <th scope="col" class="number">Requests</th>
        <th scope="col" class="number"><i class="swatch of-prompts"></i>Prompt</th>
        <th scope="col" class="number narrow">of it cached</th>
        <th scope="col" class="number"><i class="swatch of-answers"></i>Generated</th>
      </tr></thead>
      <tbody ref=${body}>
        ${rows.slice(0, count).map((row) => html`
          <tr key=${row[group]}>
            <th scope="row">${group === "tenant"
              ? html`<button type="button" class="link" title="Its interventions alone" onClick=${() => onTenant(row.tenant)}>${row.tenant}</button>`
              : group === "day" ? shortDay(row.day) : row.intervention}</th>
            <td class="wide"><${Bar} row=${row} most=${most} /></td>
            <${Counts} row=${row} />
          </tr>`)}
      </tbody>
      <tfoot><tr><th scope="row">Total</th><td class="wide"></td><${Counts} row=${total} /></tr></tfoot>
    </table>
    </div>
    ${rows.length > count && html`
      <div class="after"><span class="muted">${number(count)} of ${number(rows.length)}</span>
        <button type="button" onClick=${() => { grow(); setCount(count + SHOWN); }}>Show more</button></div>`}`;
}

const Counts = ({ row }) => html`
  <td class="number">${number(row.requests)}</td>
  <td class="number">${number(row.prompt_tokens)}</td>
  <td class="number narrow">${number(row.cached_tokens)}</td>
  <td class="number">${number(row.completion_tokens)}</td>`;

/** A row's tokens beside the largest row's: prompts, then what was generated. */
const Bar = ({ row, most }) => html`
  <svg class="use-bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">
    <rect class="of-prompts" width=${(100 * row.prompt_tokens) / most} height="10" />
    <rect class="of-answers" x=${(100 * row.prompt_tokens) / most} width=${(100 * row.completion_tokens) / most} height="10" />
  </svg>`;

const shortDay = (day) => new Date(day).toLocaleDateString("en-GB", {
  weekday: "short", day: "numeric", month: "short", timeZone: "UTC",
});

const Notes = ({ found }) => html`
  <p class="muted after">Counted since ${when(found.since)}${found.kept ? "." : ", in memory: a server without a state folder forgets it when it stops."}</p>`;
