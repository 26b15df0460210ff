// One intervention: what its file says of it, its versions, and all that can be done with it.

import { ask, save } from "./api.js";
import { tryOut } from "./comparison.js";
import { html, useRef, useState } from "./lib.js";
import { Dialog, Icon, Loading, Problem, bytes, number, percent, useLoaded } from "./ui.js";
import { put } from "./uploads.js";
import { mayChange } from "./who.js";
import { PLACES, spans, when } from "./wording.js";

export function Details({ name, base, onClose, onChange }) {
  const path = `v1/interventions/${encodeURIComponent(name)}`;
  const { data: entry, error, reload } = useLoaded((signal) => ask(path, { signal }), [path]);
  return html`
    <${Dialog} title=${name} wide onClose=${onClose}>
      ${error && html`<${Problem} error=${error} />`}
      ${!entry && !error && html`<${Loading} what=${name} />`}
      ${entry && html`<${Entry} entry=${entry} path=${path} base=${base} onClose=${onClose}
        onChange=${() => { reload(); onChange(); }} />`}
    <//>`;
}

function Entry({ entry, path, base, onClose, onChange }) {
  const { id, manifest, problem, hides } = entry;
  return html`
    <div class="stack">
      ${manifest.description && html`<p>${manifest.description}</p>`}
      ${problem && html`<${Problem} error=${{ message: problem }} />`}
      ${hides?.length > 0 && html`<p class="muted">It hides what else has this name: ${hides.join(", ")}.</p>`}
      <${Actions} entry=${entry} path=${path} onClose=${onClose} onChange=${onChange} />
      <dl class="facts">
        ${facts(entry, base).map(([what, value]) => html`
          <div key=${what}><dt>${what}</dt><dd>${value}</dd></div>`)}
      </dl>
      ${manifest.template != null && html`
        <details><summary>Prompt template</summary>
          <pre class="code" tabindex="0" aria-label="Prompt template">${manifest.template}</pre></details>`}
      <${Versions} id=${id} digest=${entry.digest} path=${path} onChange=${onChange} />
    </div>`;
}

function facts(entry, base) {
  const metrics = Object.entries(entry.manifest.metrics ?? {});
  return [
    ["Kind", entry.kinds.join(", ")],
    ["Layers", spans(entry.layers)],
    ["Positions", entry.positions.join(", ")],
    ["Parameters", html`${number(entry.parameters)} <small>${percent(entry.share)} of ${base}</small>`],
    ["Size", bytes(entry.size_bytes)],
    ["From", entry.origin],
    ["Tensors", html`${PLACES[entry.tier]} ${entry.pinned && html`<small>pinned</small>`}`],
    ["Requests", html`${number(entry.requests)} <small>${entry.in_flight} in flight</small>`],
    ["Tokens", html`${number(entry.prompt_tokens)} <small>in</small> ${number(entry.generation_tokens)} <small>out</small>`],
    ...(entry.last_used ? [["Last used", when(entry.last_used)]] : []),
    ...(metrics.length ? [["Metrics", metrics.map(([what, value]) => `${what} ${shown(value)}`).join(", ")]] : []),
    ["Digest", html`<code class="digest">${entry.digest}</code>`],
  ];
}

const shown = (value) => (typeof value === "number" ? Number(value.toPrecision(4)) : JSON.stringify(value));

function Actions({ entry, path, onClose, onChange }) {
  const { id, digest } = entry;
  const [sure, setSure] = useState(false);
  const [error, setError] = useState(null);
  const chooser = useRef();
  // Only the version that is shown is changed, so that another's upload meanwhile is not undone.
  const seen = { "if-match": `"${digest}"` };
  const attempt = (work) => async (...given) => {
    setError(null);
    try {
      await work(...given);
    } catch (problem) {
      setError(problem);
    }
  };
  const download = attempt(async () => save(await ask(`${path}/file`, { read: "blob" }), `${id}.safetensors`));
  const replace = attempt(async (file) => {
    await put(id, file, seen);
    onChange();
  });
  const remove = attempt(async () => {
    await ask(path, { method: "DELETE", headers: seen });
    onClose();
    onChange();
  });
  const moved = attempt(async (change) => {
    await ask(`${path}/${change}`, { method: "POST" });
    onChange();
  });
  const tried = () => {
    tryOut(id);
    location.hash = "#/compare";
  };
  return html`
    <div class="actions start">
      <button type="button" class="primary" onClick=${tried}><${Icon} name="play" />Try it</button>
      <button type="button" onClick=${download}><${Icon} name="down" />Download</button>
      ${mayChange(id) && html`
        <button type="button" title="Keep it in memory, or let it make room for others"
          onClick=${() => moved(entry.pinned ? "unpin" : "pin")}>
          <${Icon} name="pin" />${entry.pinned ? "Unpin" : "Pin"}</button>
        ${entry.tier === "disk" && html`
          <button type="button" title="Read it into memory now, so that no request waits for that"
            onClick=${() => moved("warm")}><${Icon} name="warm" />Warm</button>`}
        <button type="button" onClick=${() => chooser.current.click()}><${Icon} name="up" />Replace</button>
        <input ref=${chooser} type="file" hidden accept=".safetensors" aria-label=${`A new file for ${id}`}
          onChange=${(event) => { replace(event.target.files[0]); event.target.value = ""; }} />
        ${sure
          ? html`<span class="sure" role="group" aria-label="Delete?">Serve it no longer?
              <button type="button" class="danger" onClick=${remove}>Delete ${id}</button>
              <button type="button" onClick=${() => setSure(false)}>Keep it</button></span>`
          : html`<button type="button" onClick=${() => setSure(true)}><${Icon} name="trash" />Delete</button>`}`}
    </div>
    ${error && html`<${Problem} error=${error} />`}`;
}

function Versions({ id, digest, path, onChange }) {
  const { data, error } = useLoaded((signal) => ask(`${path}/versions`, { signal }), [path, digest]);
  const [problem, setProblem] = useState(null);
  const back = async (version) => {
    setProblem(null);
    try {
      await ask(`${path}/rollback`, {
        method: "POST", json: { digest: version }, headers: { "if-match": `"${digest}"` },
      });
      onChange();
    } catch (found) {
      setProblem(found);
    }
  };
  return html`
    <section class="stack" aria-label="Versions">
      <h3>Versions</h3>
      ${(error ?? problem) && html`<${Problem} error=${error ?? problem} />`}
      <ul class="versions">
        ${data?.data.map((version) => html`
          <li key=${version.digest}>
            <code>${version.digest.slice(0, 12)}</code>
            <span class="muted">${bytes(version.size_bytes)}${version.modified ? `, ${when(version.modified)}` : ""}</span>
            ${version.current && html`<span class="count">served</span>`}
            ${!version.current && version.kept && mayChange(id) && html`<button type="button" onClick=${() => back(version.digest)}>
                  <${Icon} name="back" />Roll back<span class="unseen"> to ${version.digest.slice(0, 12)}</span></button>`}
          </li>`)}
      </ul>
    </section>`;
}
