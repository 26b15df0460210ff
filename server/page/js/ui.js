// Small parts that several views use: icons, buttons, dialogs, errors, numbers in words.

import { classes, html, useEffect, useLayoutEffect, useRef, useState } from "./lib.js";

const PATHS = {
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  reset: "M4 4v6h6M20 12a8 8 0 1 1-2.6-5.9L20 8",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  code: "M8 7l-5 5 5 5M16 7l5 5-5 5",
  down: "M12 4v11M7 11l5 5 5-5M5 20h14",
  up: "M12 16V5M7 9l5-5 5 5M5 20h14",
  trash: "M5 7h14M10 4h4M7 7l1 13h8l1-13M10 11v5M14 11v5",
  back: "M9 14L4 9l5-5M4 9h10a6 6 0 0 1 0 12h-3",
  link: "M10 14a4 4 0 0 0 6 0l3-3a4 4 0 0 0-6-6l-1 1M14 10a4 4 0 0 0-6 0l-3 3a4 4 0 0 0 6 6l1-1",
  play: "M7 5l12 7-12 7z",
  stop: "M7 7h10v10H7z",
  chevron: "M6 9l6 6 6-6",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v2M12 20v2M4.9 4.9l1.4 1.4M17.7 17.7l1.4 1.4"
    + "M2 12h2M20 12h2M4.9 19.1l1.4-1.4M17.7 6.3l1.4-1.4",
  moon: "M20 14A8 8 0 1 1 10 4a7 7 0 0 0 10 10z",
  pin: "M9 4h6l-1 6 4 3v2H6v-2l4-3zM12 15v5",
  warm: "M12 3c1 4 5 5 5 10a5 5 0 0 1-10 0c0-3 2-4 2-6 2 1 3 3 3 5",
  search: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14M16 16l5 5",
  sliders: "M4 7h10M18 7h2M4 17h2M10 17h10M16 5v4M8 15v4",
};

export const Icon = ({ name }) => html`
  <svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><path d=${PATHS[name]} /></svg>`;

/** A button of an icon alone; its label is read out, and shown when the pointer rests on it. */
export const IconButton = ({ icon, label, focus, ...rest }) => html`
  <button ref=${focus} type="button" class="icon-button" aria-label=${label} title=${label} ...${rest}>
    <${Icon} name=${icon} />
  </button>`;

/**
 * Submits its form; with `onStop` it ends what was begun so. It stays one element, which keeps the
 * focus. It may begin again before the browser has done with the press that ended it: so that press
 * does nothing else.
 */
export function RunButton({ label, disabled, onStop }) {
  const press = (event) => {
    if (!onStop) return;
    event.preventDefault();
    onStop();
  };
  return html`
    <button type=${onStop ? "button" : "submit"} class=${onStop ? "" : "primary"}
      disabled=${disabled && !onStop} onClick=${press}>
      <${Icon} name=${onStop ? "stop" : "play"} />${onStop ? "Stop" : label}</button>`;
}

/** Copies what `text()` gives, and says for a moment whether it did. */
export function CopyButton({ text, label = "Copy", icon = "copy", small = false }) {
  const [said, setSaid] = useState(null);
  const copy = async () => {
    setSaid(await copyText(await text()).then(() => "Copied", () => "Not copied: the browser does not allow it"));
    setTimeout(() => setSaid(null), 1500);
  };
  if (small) {
    return html`<${IconButton} icon=${icon} label=${said ?? label} onClick=${copy} />`;
  }
  return html`<button type="button" onClick=${copy}>
    <${Icon} name=${icon} /><span aria-live="polite">${said ?? label}</span>
  </button>`;
}

async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  // A page that came over plain HTTP from another machine can copy only in this way.
  const area = document.createElement("textarea");
  area.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("The browser has copied nothing.");
}

/**
 * A modal dialog, open as long as it is in the document; Escape, its cross and a press beside it close
 * it. Then the focus goes back to where it was.
 */
export function Dialog({ title, onClose, wide = false, children }) {
  const dialog = useRef();
  const beside = useRef(false); // where the press has begun: a text may be selected past the edge
  useEffect(() => {
    const before = document.activeElement;
    dialog.current.showModal();
    return () => before.focus();
  }, []);
  return html`
    <dialog ref=${dialog} class=${classes(wide && "wide")} aria-labelledby="dialog-title"
      onClose=${onClose} onMouseDown=${(event) => (beside.current = event.target === dialog.current)}
      onClick=${(event) => beside.current && event.target === dialog.current && onClose()}>
      <div class="dialog-body">
        <header>
          <h2 id="dialog-title">${title}</h2>
          <${IconButton} icon="close" label="Close" onClick=${onClose} />
        </header>
        ${children}
      </div>
    </dialog>`;
}

/** What went wrong, in the server's own words, when to try again, and what can be done. */
export const Problem = ({ error, retry }) => html`
  <div class="problem" role="alert">
    <p>${error.message}${error.again && html` <span class="again">It may be sent again at ${clock(error.again)}.</span>`}</p>
    ${retry && html`<button type="button" onClick=${retry}>Try again</button>`}
  </div>`;

export const Empty = ({ title, children }) => html`
  <div class="empty"><h2>${title}</h2>${children}</div>`;

export const Loading = ({ what }) => html`<p class="loading" role="status">Loading ${what}…</p>`;

/** One of a few choices, as buttons side by side; `options` are [value, label]. */
export const Segmented = ({ label, value, options, onChange }) => html`
  <div class="segmented" role="group" aria-label=${label}>
    ${options.map(([option, text]) => html`
      <button type="button" aria-pressed=${option === value} key=${option}
        onClick=${() => onChange(option)}>${text}</button>`)}
  </div>`;

/**
 * A field for a number. What is typed is kept until it is complete, whatever is drawn meanwhile;
 * `onChange` gets its text then, which may be empty.
 */
export function NumberInput({ value, onChange, ...bounds }) {
  const [draft, setDraft] = useState(null);
  const done = (event) => {
    setDraft(null);
    onChange(event.target.value);
  };
  return html`<input type="number" ...${bounds} value=${draft ?? value ?? ""}
    onInput=${(event) => setDraft(event.target.value)} onChange=${done} />`;
}

/**
 * A table of `count` rows that can grow: a reference for its body, and what is called when the user wants
 * more. The first row that then comes takes the focus, which the button loses that goes with the last ones.
 */
export function useGrowing(count) {
  const body = useRef();
  const from = useRef(Infinity);
  useLayoutEffect(() => {
    const row = body.current?.rows[from.current];
    if (!row) return;
    from.current = Infinity;
    row.tabIndex = -1;
    row.focus({ preventScroll: true });
  }, [count]);
  return [body, () => (from.current = count)];
}

/** Whether a key belongs to an input method. Safari says so of the Enter that ends a composition by its code alone. */
export const composes = (event) => event.isComposing || event.keyCode === 229;

/** Data of a route: loaded when `path` changes, with the state it is in. */
export function useLoaded(load, inputs) {
  const [state, setState] = useState({ data: null, error: null });
  const [round, setRound] = useState(0);
  useEffect(() => {
    const controller = new AbortController();
    load(controller.signal).then(
      (data) => setState({ data, error: null }),
      (error) => error.name !== "AbortError" && setState((old) => ({ ...old, error })),
    );
    return () => controller.abort();
  }, [...inputs, round]);
  return { ...state, reload: () => setRound((old) => old + 1) };
}

const clock = (time) => new Date(time).toLocaleTimeString("en-GB", { timeStyle: "medium" });

// Numbers in words

const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function bytes(count) {
  const power = count ? Math.min(Math.floor(Math.log10(count) / 3), UNITS.length - 1) : 0;
  const value = count / 1000 ** power;
  return `${power && value < 100 ? value.toFixed(1) : Math.round(value)} ${UNITS[power]}`;
}

export const number = (value) => value.toLocaleString("en");

export const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

export const percent = (share) => `${(share * 100).toPrecision(2)} %`;
