// A search among the served interventions, by the server: a combobox with a list below it.

import { ask } from "./api.js";
import { note } from "./labels.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "./lib.js";
import { composes, useLoaded } from "./ui.js";

const SHOWN = 12;
const PAUSE_MS = 150;

let count = 0;

/** A button that is a picker while it is open. The focus is its again after a key has closed that. */
export function Choose({ label, first, onPick, children, ...button }) {
  const [open, setOpen] = useState(false);
  const opener = useRef();
  const byKey = useRef(false);
  useLayoutEffect(() => {
    if (open || !byKey.current) return;
    byKey.current = false;
    opener.current.focus();
  }, [open]);
  if (!open) {
    return html`<button ref=${opener} type="button" ...${button} onClick=${() => setOpen(true)}>${children}</button>`;
  }
  const close = () => {
    byKey.current = true;
    setOpen(false);
  };
  return html`<${Picker} label=${label} first=${first} onClose=${close} onLeave=${() => setOpen(false)}
    onPick=${(name) => { close(); onPick(name); }} />`;
}

/**
 * `onPick` gets a name, or null for `first`, an entry of its own before those that are found. `onClose`
 * is called at Escape, `onLeave` when the focus goes elsewhere.
 */
export function Picker({ label, first, onPick, onClose, onLeave }) {
  const [text, setText] = useState("");
  const [searched, setSearched] = useState("");
  const [active, setActive] = useState(0);
  const [id] = useState(() => `picker-${(count += 1)}`);
  const box = useRef();
  useLayoutEffect(() => box.current.focus(), []);
  useEffect(() => {
    const timer = setTimeout(() => setSearched(text.trim()), PAUSE_MS);
    return () => clearTimeout(timer);
  }, [text]);
  const { data, error } = useLoaded(
    async (signal) => {
      const query = encodeURIComponent(searched);
      const found = await ask(`v1/interventions?limit=${SHOWN}&q=${query}`, { signal });
      note(found.data);
      return { ...found, searched };
    },
    [searched],
  );
  const found = (data?.data ?? []).map((entry) => ({
    name: entry.id, text: entry.id, description: entry.manifest.description,
  }));
  const options = first && !text.trim() ? [{ name: null, text: first }, ...found] : found;
  // Enter right after typing picks from what will be found, not from what is still shown.
  const [entered, setEntered] = useState(false);
  const current = data?.searched === text.trim();
  useEffect(() => {
    if (entered && current) options[active] ? onPick(options[active].name) : setEntered(false);
  }, [entered, current]);

  const keys = (event) => {
    if (composes(event)) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && options.length) {
      const next = (active + step + options.length) % options.length;
      setActive(next);
      document.getElementById(`${id}-${next}`).scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter") setEntered(true);
    else if (event.key === "Escape") onClose();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  // The focus stays in the field: a press in the list must not take it.
  return html`
    <div class="picker">
      <input ref=${box} type="text" role="combobox" aria-label=${label} placeholder="Search…"
        aria-expanded="true" aria-controls=${id} aria-autocomplete="list" autocomplete="off"
        aria-activedescendant=${options[active] ? `${id}-${active}` : null} value=${text}
        onInput=${(event) => { setText(event.target.value); setActive(0); setEntered(false); }}
        onKeyDown=${keys} onBlur=${onLeave} />
      <ul id=${id} role="listbox" aria-label=${label} onMouseDown=${(event) => event.preventDefault()}>
        ${options.map((option, i) => html`
          <li key=${option.text} id=${`${id}-${i}`} role="option" aria-selected=${i === active}
            onClick=${() => onPick(option.name)} onMouseEnter=${() => setActive(i)}>
            <span>${option.text}</span>
            ${option.description && html`<small>${option.description}</small>`}
          </li>`)}
        ${options.length === 0 && html`
          <li role="option" aria-selected="false" aria-disabled="true" class="muted">
            ${error ? error.message : data ? "Nothing is found" : "Searching…"}
          </li>`}
      </ul>
      ${data?.total > found.length && html`
        <small class="muted more">${data.total - found.length} more: type a part of the name</small>`}
    </div>`;
}
