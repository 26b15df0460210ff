// A comparison leaves the page and comes back: as a link, a file, or one column's request.

import { address, save } from "./api.js";
import { change, comparison, replace } from "./comparison.js";
import { html, useRef, useState } from "./lib.js";
import { fromRequest, linked, plain, requestOf, revived, title } from "./session.js";
import { CopyButton, Dialog, IconButton, Problem, Segmented } from "./ui.js";

const TOO_LONG = "The link holds the columns and their settings alone: texts as long as these do not fit into an address. "
  + "“Export” writes a file with everything.";

/** `packed` refers to what the address has of the session, if that is in step. */
export function ShareMenu({ session, packed }) {
  const file = useRef();
  const copied = async () => {
    // Safari lets a press copy only what is there at once.
    const { whole, link } = packed.current ?? (await linked(session));
    if (link !== whole) comparison.set({ problem: new Error(TOO_LONG) });
    return `${address("")}#/compare/${link}`;
  };
  const exported = () => {
    const json = JSON.stringify(plain(session, true), null, 1);
    save(new Blob([json], { type: "application/json" }), "comparison.json");
  };
  const imported = async (event) => {
    const [chosen] = event.target.files;
    event.target.value = "";
    try {
      replace(revived(JSON.parse(await chosen.text())));
    } catch {
      comparison.set({ problem: new Error(`${chosen.name} is no comparison that was exported here.`) });
    }
  };
  return html`
    <${CopyButton} label="Copy link" icon="link" text=${copied} />
    <${IconButton} icon="down" label="Export" onClick=${exported} />
    <${IconButton} icon="up" label="Import" onClick=${() => file.current.click()} />
    <input ref=${file} type="file" accept="application/json,.json" hidden aria-label="A comparison's file"
      onChange=${imported} />`;
}

/** The dialog that is open, if one is. */
export function ShareDialog({ dialog, session, base }) {
  const close = () => comparison.set({ dialog: null });
  if (dialog?.kind === "copy") {
    return html`<${CopyAs} session=${session} base=${base} ...${dialog} onClose=${close} />`;
  }
  return dialog && html`<${Paste} session=${session} base=${base} c=${dialog.c} onClose=${close} />`;
}

const FORMS = [["curl", "curl"], ["python", "Python"], ["json", "JSON"]];

function CopyAs({ session, base, c, t, onClose }) {
  const [form, setForm] = useState("curl");
  const { path, body } = requestOf(session, base, c, t);
  const text = WRITERS[form](path, body);
  return html`
    <${Dialog} title=${`The request of ${title(session.columns[c])}`} wide onClose=${onClose}>
      <div class="bar">
        <${Segmented} label="Form" value=${form} options=${FORMS} onChange=${setForm} />
        <${CopyButton} text=${() => text} />
      </div>
      <pre class="code" tabindex="0" aria-label=${`The request as ${form}`}><code>${text}</code></pre>
    <//>`;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

const WRITERS = {
  json: (path, body) => JSON.stringify(body, null, 2),

  curl: (path, body) =>
    `curl ${address(path)} \\\n  -H 'Content-Type: application/json' \\\n`
    + `  -H "Authorization: Bearer $REFT_API_KEY" \\\n  -d ${quoted(JSON.stringify(body, null, 2))}`,

  python: (path, body) => {
    const { own, extra } = parted(body);
    const call = body.messages ? "chat.completions" : "completions";
    const answer = body.messages ? "message.content" : "text";
    const lines = Object.entries(own).map(([name, value]) => `    ${name}=${python(value, 1)},`);
    if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra, 1)},`);
    return [
      "import os",
      "",
      "from openai import OpenAI",
      "",
      `client = OpenAI(base_url="${address("v1")}", api_key=os.environ.get("REFT_API_KEY", "none"))`,
      `answer = client.${call}.create(`,
      ...lines,
      ")",
      `print(answer.choices[0].${answer})`,
    ].join("\n");
  },
};

/** A body in two parts: fields that the OpenAI client has arguments for, and those it passes on. */
function parted(body) {
  const passed = ["interventions", "top_k", "min_p", "repetition_penalty"];
  const entries = Object.entries(body);
  return {
    own: Object.fromEntries(entries.filter(([name]) => !passed.includes(name))),
    extra: Object.fromEntries(entries.filter(([name]) => passed.includes(name))),
  };
}

/** A JSON value as Python writes it; lists and objects over several lines. */
function python(value, depth) {
  const inner = "    ".repeat(depth + 1);
  const end = "    ".repeat(depth);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) {
    if (value.every((one) => typeof one !== "object")) return `[${value.map((one) => python(one)).join(", ")}]`;
    return `[\n${value.map((one) => `${inner}${python(one, depth + 1)},\n`).join("")}${end}]`;
  }
  const fields = Object.entries(value);
  if (fields.every(([, one]) => typeof one !== "object" || one?.every?.((x) => typeof x !== "object"))) {
    return `{${fields.map(([name, one]) => `"${name}": ${python(one)}`).join(", ")}}`;
  }
  return `{\n${fields.map(([name, one]) => `${inner}"${name}": ${python(one, depth + 1)},\n`).join("")}${end}}`;
}

function Paste({ session, base, c, onClose }) {
  const [text, setText] = useState("");
  const [error, setError] = useState(null);
  const submit = (event) => {
    event.preventDefault();
    try {
      change(taken(session, fromRequest(text, base), c));
      onClose();
    } catch (problem) {
      setError(problem);
    }
  };
  return html`
    <${Dialog} title="Paste a request" wide onClose=${onClose}>
      <form class="stack" onSubmit=${submit}>
        <label class="field">The JSON body of a chat or text completion
          <textarea class="code" rows="12" autofocus spellcheck="false" value=${text}
            onInput=${(event) => { setText(event.target.value); setError(null); }}></textarea>
        </label>
        ${error && html`<${Problem} error=${error} />`}
        <p class="muted">The column gets its interventions; prompt and settings are those of all columns.</p>
        <div class="actions"><button class="primary" disabled=${!text.trim()}>Take it over</button></div>
      </form>
    <//>`;
}

/** The fields of a session after a request was pasted into its column `c`. */
function taken(session, { parts, turns, sampling, ...fields }, c) {
  const columns = session.columns.map((one, i) => (i === c ? { ...one, parts } : one));
  const said = (text) =>
    text === undefined ? null : { text, of: null, pieces: [], prompt: [], ids: [], finish: null, error: null, figures: null };
  return {
    ...fields,
    columns,
    sampling: { ...session.sampling, ...sampling },
    turns: turns.map(({ user, answer }) => ({ user, answers: columns.map(() => said(answer)) })),
  };
}
