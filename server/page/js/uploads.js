// Files on their way to the server. A name that is taken is replaced only if the user says so.

import { ask } from "./api.js";
import { html } from "./lib.js";
import { Store, useStore } from "./store.js";
import { IconButton } from "./ui.js";
import { proposed } from "./who.js";

/** Uploads: each is {id, file, name, state: "sending" | "done" | "taken" | "failed", message}. */
const uploads = new Store({ list: [] });
let count = 0;

const update = (id, fields) =>
  uploads.set({ list: uploads.value.list.map((one) => (one.id === id ? { ...one, ...fields } : one)) });

/** Upload files, each under its own name, behind the tenant's prefix; `done` is called after each that is served. */
export function take(files, done) {
  for (const file of files) {
    const id = (count += 1);
    const name = proposed(file.name.replace(/\.safetensors$/, ""));
    uploads.set({ list: [...uploads.value.list, { id, file, name, state: "sending", message: "" }] });
    send(id, file, name, { "if-none-match": "*" }, done);
  }
}

/** Serve a file under a name; an error is said where the upload is shown. */
async function send(id, file, name, headers, done) {
  update(id, { state: "sending", message: "" });
  try {
    const entry = await put(name, file, headers);
    update(id, { state: "done", message: `${name} is served, version ${entry.digest.slice(0, 8)}.` });
    done();
  } catch (error) {
    if (error.status === 412) update(id, { state: "taken", message: `${name} is served already.` });
    else update(id, { state: "failed", message: error.message });
  }
}

export async function put(name, file, headers = {}) {
  await readable(file);
  return ask(`v1/interventions/${encodeURIComponent(name)}`, {
    method: "PUT", body: file, headers: { "content-type": "application/octet-stream", ...headers },
  });
}

/** Throws where a file cannot be sent: the browser would say the same as of a server that is gone. */
async function readable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Error(`${file.name} cannot be read: it is a folder, or no longer as it was when it was chosen.`);
  }
}

export function Uploads({ reload }) {
  const { list } = useStore(uploads);
  if (!list.length) return null;
  const drop = (id) => uploads.set({ list: list.filter((one) => one.id !== id) });
  return html`
    <ul class="uploads" aria-label="Uploads">
      ${list.map(({ id, file, name, state, message }) => html`
        <li key=${id} class=${state}>
          <strong>${file.name}</strong>
          <span role=${state === "failed" ? "alert" : "status"}>${message || "Uploading…"}</span>
          ${state === "taken" && html`
            <button type="button" onClick=${() => send(id, file, name, {}, reload)}>Replace it</button>`}
          ${state !== "sending" && html`
            <${IconButton} icon="close" label=${`Dismiss ${file.name}`} onClick=${() => drop(id)} />`}
        </li>`)}
    </ul>`;
}
