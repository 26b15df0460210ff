// The API's reference: /openapi.json as a page, an operation a section, schemas folded out.

import { ask, key, save } from "./api.js";
import { Frame } from "./frame.js";
import { html, render, useState } from "./lib.js";
import { Store, useStore } from "./store.js";
import { Icon, Loading, Problem } from "./ui.js";
import { introduce, who } from "./who.js";

const page = new Store({ document: null, error: null });

async function begin() {
  page.set({ error: null });
  try {
    page.set({ document: await ask("openapi.json") });
    if (key()) await introduce();
  } catch (error) {
    page.set({ error });
  }
}

const HEADINGS = {
  openai: "Answers and models", interventions: "Interventions", text: "Tokens", operations: "Operations",
  health: "Health", vllm: "vLLM's routes",
};

/** Operations by tag: those of `HEADINGS` in that order, then the others. */
function grouped({ paths }) {
  const groups = new Map(Object.keys(HEADINGS).map((tag) => [tag, []]));
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const [tag = "other"] = operation.tags ?? [];
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push({ path, method, operation });
    }
  }
  return [...groups];
}

const LINKS = [
  ["./#/compare", "Compare", false],
  ["./#/look", "Look inside", false],
  ["./#/interventions", "Interventions", false],
  ["./#/server", "Server", false],
  ["docs", "API", true],
];

function Reference() {
  const { document: found, error } = useStore(page);
  const { me } = useStore(who);
  return html`
    <${Frame} links=${LINKS} me=${me}>
      ${error && html`<${Problem} error=${error} retry=${begin} />`}
      ${!found && !error && html`<${Loading} what="the API's description" />`}
      ${found && html`<${Operations} found=${found} />`}
    <//>`;
}

function Operations({ found }) {
  const [query, setQuery] = useState("");
  const wanted = query.trim().toLowerCase();
  const fits = ({ path, method, operation }) =>
    `${method} ${path} ${operation.summary} ${operation.description}`.toLowerCase().includes(wanted);
  const groups = grouped(found)
    .map(([tag, list]) => [tag, list.filter(fits)])
    .filter(([, list]) => list.length);
  return html`
    <div class="head">
      <h1>API</h1><span class="muted">${found.info.title} ${found.info.version}</span>
      <span class="spring"></span>
      <label class="search"><${Icon} name="search" />
        <input type="search" aria-label="Search routes" placeholder="Search" value=${query}
          onInput=${(event) => setQuery(event.target.value)} /></label>
      <button type="button" onClick=${() => saved(found)}><${Icon} name="down" />openapi.json</button>
    </div>
    ${groups.length === 0 && html`<p class="muted">No route has that text.</p>`}
    ${groups.map(([tag, list]) => html`
      <section key=${tag} class="group" aria-label=${HEADINGS[tag] ?? tag}>
        <h2>${HEADINGS[tag] ?? tag}</h2>
        ${list.map((one) => html`<${Operation} key=${one.method + one.path} ...${one} found=${found} />`)}
      </section>`)}`;
}

const saved = (found) =>
  save(new Blob([JSON.stringify(found, null, 2)], { type: "application/json" }), "openapi.json");

/** Text as HTML, with its parts in backticks as code. */
const prose = (text) => text.split("`").map((part, i) => (i % 2 ? html`<code>${part}</code>` : part));

function Operation({ path, method, operation, found }) {
  const { description = "", parameters = [], requestBody, responses } = operation;
  return html`
    <details class="operation panel">
      <summary>
        <span class=${`method ${method}`}>${method.toUpperCase()}</span>
        <code>${path}</code>
        <span class="muted">${operation.summary}</span>
      </summary>
      <div class="stack">
        <p class="prose">${prose(description)}</p>
        ${parameters.length > 0 && html`
          <h3>Parameters</h3>
          <dl class="fields-list">
            ${parameters.map(({ name, in: place, required, schema, description: about }) => html`
              <${Field} key=${name} name=${name} schema=${schema} required=${required}
                about=${[`in the ${place}`, about].filter(Boolean).join("; ")} found=${found} />`)}
          </dl>`}
        ${requestBody && Object.entries(requestBody.content).map(([type, { schema, example }]) => html`
          <h3 key=${type}>Body <small class="muted">${type}</small></h3>
          ${example && html`<pre class="code" tabindex="0">${JSON.stringify(example, null, 2)}</pre>`}
          <${Fields} schema=${schema} found=${found} />`)}
        <h3>Answers</h3>
        <dl class="answers">
          ${Object.entries(responses).map(([status, response]) => html`
            <div key=${status}><dt class=${status < 400 ? "good" : ""}>${status}</dt>
              <dd>${prose(response.description)}
                ${status < 400 && Object.entries(response.content ?? {}).map(([type, { schema }]) => html`
                  <${Content} key=${type} type=${type} schema=${schema} found=${found} />`)}</dd></div>`)}
        </dl>
      </div>
    </details>`;
}

/** What an answer of one type holds, folded out: one of several schemas in a stream of events. */
function Content({ type, schema, found }) {
  return html`
    <details><summary>${type}</summary>
      ${choices(schema).map((one) => html`
        ${one.$ref && html`<h4>${typeName(one, found)}</h4>`}
        <${Fields} schema=${one} found=${found} />`)}
    </details>`;
}

const resolved = (schema, found) =>
  schema?.$ref ? found.components.schemas[schema.$ref.split("/").at(-1)] : schema;

/** The fields of an object's schema; for another schema, the name of its type. */
function Fields({ schema, found }) {
  const object = resolved(schema, found);
  if (!object?.properties) return html`<p class="muted">${typeName(schema, found)}</p>`;
  const required = new Set(object.required);
  // Required fields come first; the others keep their order.
  const fields = Object.entries(object.properties).sort(
    ([a], [b]) => required.has(b) - required.has(a),
  );
  return html`
    ${object.description && html`<p class="prose muted">${prose(object.description)}</p>`}
    <dl class="fields-list">
      ${fields.map(([name, one]) => html`
        <${Field} key=${name} name=${name} schema=${one} required=${required.has(name)}
          about=${one.description} found=${found} />`)}
    </dl>`;
}

function Field({ name, schema, required, about, found }) {
  const inner = objects(schema, found);
  const bounds = limits(schema);
  return html`
    <div>
      <dt><code>${name}</code>${required && html` <span class="count">required</span>`}</dt>
      <dd>
        <span class="type">${typeName(schema, found)}</span>
        ${bounds && html`<span class="muted">, ${bounds}</span>`}
        ${schema.default !== undefined && schema.default !== null && html`
          <span class="muted">, by default <code>${JSON.stringify(schema.default)}</code></span>`}
        ${about && html`<p>${prose(about)}</p>`}
        ${inner.map((one) => html`
          <details key=${one.title}><summary>${one.title}</summary><${Fields} schema=${one} found=${found} /></details>`)}
      </dd>
    </div>`;
}

/** The alternatives of a schema without null, which only says that a field may be left out. */
const choices = (schema) =>
  (schema?.anyOf ?? schema?.oneOf ?? [schema ?? {}]).filter(({ type }) => type !== "null");

function typeName(schema, found) {
  const names = choices(schema).map((one) => {
    if (one.anyOf || one.oneOf) return typeName(one, found);
    if (one.$ref) return one.$ref.split("/").at(-1);
    if (one.const !== undefined) return JSON.stringify(one.const);
    if (one.enum) return one.enum.map((value) => JSON.stringify(value)).join(", ");
    if (one.type === "array") return `list of ${typeName(one.items, found)}`;
    if (one.format === "binary") return "bytes";
    return one.type ?? "anything";
  });
  return [...new Set(names)].join(" or ");
}

/** The objects within a schema that have fields of their own. */
function objects(schema, found) {
  return choices(schema).flatMap((one) => {
    if (one.anyOf || one.oneOf) return objects(one, found);
    if (one.type === "array") return objects(one.items, found);
    const object = resolved(one, found);
    return object?.properties ? [object] : [];
  });
}

/** The bounds of a schema in words; no range if a JavaScript number cannot hold one of its bounds. */
function limits(schema) {
  const [one = {}] = choices(schema);
  const bounds = [one.minimum, one.exclusiveMinimum, one.maximum, one.exclusiveMaximum];
  if (bounds.some((bound) => Number.isInteger(bound) && !Number.isSafeInteger(bound))) return "";
  const low = one.minimum ?? (one.exclusiveMinimum === undefined ? null : `above ${one.exclusiveMinimum}`);
  const high = one.maximum ?? one.exclusiveMaximum ?? null;
  if (low !== null && high !== null) return `${low} to ${high}`;
  if (low !== null) return typeof low === "string" ? low : `at least ${low}`;
  if (high !== null) return `at most ${high}`;
  if (one.maxItems === 0) return "must be empty";
  const most = one.maxLength ?? one.maxItems;
  return most === undefined ? "" : `up to ${most} ${one.maxLength === undefined ? "of them" : "characters"}`;
}

render(html`<${Reference} />`, document.getElementById("app"));
begin();
