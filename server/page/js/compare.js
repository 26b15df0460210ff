// Compare: one conversation, answered by up to four columns at once.

import { ask } from "./api.js";
import { Answer } from "./answer.js";
import { AddColumn, ColumnCard } from "./column.js";
import { change, comparison, draft, replace } from "./comparison.js";
import { note } from "./labels.js";
import { classes, html, useEffect, useLayoutEffect, useRef, useState } from "./lib.js";
import { answer, measure, unmeasured } from "./run.js";
import { MAX_COLUMNS, column, linked, newSession, title, unpacked } from "./session.js";
import { Settings, changed as changedSettings } from "./settings.js";
import { ShareDialog, ShareMenu } from "./share.js";
import { useStore } from "./store.js";
import { Icon, IconButton, Problem, RunButton, Segmented, composes } from "./ui.js";

const EXAMPLES = ["Who are you?", "What's a dog?", "Why is the sky blue?", "Give me a tip for Monday."];

const COLOURS = [
  ["none", "Plain"],
  ["probability", "Probability"],
  ["distance", "Distance from base"],
];

/** Characters of a turn that may not fit its part of the window: keys must reach it to scroll. */
const LONG = 800;

/** Interventions with the plainest effect; the first columns show them if they are served. */
const SHOWN = ["pirate", "emoji"];

/** The first session: a column of the base, and columns of two interventions that are served. */
async function firstSession() {
  const { data } = await ask("v1/interventions?limit=50");
  note(data);
  const names = data.filter(({ problem }) => !problem).map(({ id }) => id);
  const first = [...SHOWN.filter((name) => names.includes(name)), ...names];
  const two = [...new Set(first)].slice(0, 2);
  return newSession([column(), ...two.map((name) => column(name))]);
}

async function open(rest) {
  try {
    if (rest) replace(await unpacked(rest));
    else if (!comparison.value.session) replace(await firstSession());
  } catch (error) {
    const problem = rest ? new Error("This link holds no comparison that can be read.") : error;
    comparison.set({ problem, session: comparison.value.session ?? (rest ? newSession() : null) });
  }
}

/** `rest` holds a comparison, if the address does; `visit` is another value each time that it is gone to. */
export function Compare({ base, rest, visit }) {
  const { session, running, problem, dialog } = useStore(comparison);
  useEffect(() => {
    // Opens a link that was followed, or the view anew; not the address that this view wrote itself.
    const held = history.state ?? rest;
    if (held !== written.current) open(held);
  }, [visit]);
  const written = useRef(null);
  const packed = useAddress(session, running, written, visit);
  useDistance(session, running, base);
  if (!session) return problem && html`<${Problem} error=${problem} retry=${() => open("")} />`;
  const { columns, turns, mode } = session;
  const all = columns.map((_, c) => c);

  const say = (user) => {
    const kept = mode === "text" ? [] : turns;
    change({ turns: [...kept, { user, answers: columns.map(() => null) }] });
    answer(comparison, base, kept.length, all);
  };
  const edit = (t, user) => {
    leave({ turns: [...turns.slice(0, t), { user, answers: columns.map(() => null) }] });
    answer(comparison, base, t, all);
  };
  return html`
    <h1 class="unseen">Compare</h1>
    <${Toolbar} session=${session} packed=${packed} busy=${running !== null} />
    ${problem && html`<${Problem} error=${problem} />`}
    <section class=${`columns of-${columns.length}`} aria-label="Columns">
      ${columns.map((one, c) => html`
        <${ColumnCard} key=${c} c=${c} column=${one} session=${session} base=${base}
          busy=${running !== null} />`)}
    </section>
    <section class="turns" aria-label="Conversation">
      ${turns.length === 0 && html`<${Welcome} say=${say} columns=${columns.length} />`}
      ${turns.map((turn, t) => html`
        <${Turn} key=${t} turn=${turn} t=${t} session=${session}
          busy=${running !== null} last=${t === turns.length - 1}
          onEdit=${(user) => edit(t, user)} onAnswer=${(which) => answer(comparison, base, t, which)} />`)}
    </section>
    <${Spoken} turns=${turns} busy=${running !== null} />
    <${Composer} mode=${mode} busy=${running !== null} onSay=${say}
      onStop=${() => running.abort()} again=${turns.length > 0} />
    <${ShareDialog} dialog=${dialog} session=${session} base=${base} />`;
}

/** Change fields of the session so that turns are dropped: the browser's way back leads to them. */
async function leave(fields) {
  const left = linked(comparison.value.session);
  change(fields);
  const entry = historyEntry(await left);
  history.replaceState(...entry);
  history.pushState(...entry);
}

/** State and address of an entry of the browser's history; the state holds what an address is too short for. */
const historyEntry = ({ whole, link }) => [link === whole ? null : whole, "", `#/compare/${link}`];

/**
 * Keeps the address in step with the session, once answers have ended. Gives a reference to the session
 * as the address has it; null where that is not in step.
 */
function useAddress(session, running, written, visit) {
  const inStep = useRef(null);
  useEffect(() => {
    inStep.current = null;
    if (!session || running) return undefined;
    let stale = false;
    const timer = setTimeout(async () => {
      const packed = await linked(session);
      if (stale) return;
      inStep.current = packed;
      written.current = packed.whole;
      history.replaceState(...historyEntry(packed));
    }, 250);
    return () => {
      stale = true;
      clearTimeout(timer);
    };
  }, [session, running, visit]);
  return inStep;
}

/** Asks the base about answers that are coloured by their distance from it, once they have ended. */
function useDistance(session, running, base) {
  useEffect(() => {
    if (running || session?.colour !== "distance") return;
    const answers = unmeasured(session.turns.flatMap((turn) => turn.answers));
    if (!answers.length) return;
    measure(comparison, base, answers).catch((problem) => comparison.set({ problem }));
  }, [session, running]);
}

function Toolbar({ session, packed, busy }) {
  const { mode, colour, turns } = session;
  const [settings, setSettings] = useState(false);
  const count = changedSettings(session);
  return html`
    <div class="toolbar">
      <${Segmented} label="Kind of prompt" value=${mode}
        options=${[["chat", "Chat"], ["text", "Text"]]}
        onChange=${(chosen) => chosen !== mode && leave({ mode: chosen, turns: [] })} />
      <label class="inline">Colour
        <select value=${colour} onChange=${(event) => change({ colour: event.target.value })}>
          ${COLOURS.map(([value, text]) => html`<option value=${value} key=${value}>${text}</option>`)}
        </select>
      </label>
      ${colour !== "none" && html`<${Legend} colour=${colour} />`}
      <span class="spring"></span>
      <${AddColumn} busy=${busy || session.columns.length === MAX_COLUMNS} onAdd=${(added) => change({
        columns: [...session.columns, added],
        turns: turns.map((turn) => ({ ...turn, answers: [...turn.answers, null] })),
      })} />
      <button type="button" class="quiet" aria-expanded=${settings}
        onClick=${() => setSettings(!settings)}>
        <${Icon} name="sliders" />Settings${count > 0 && html`<span class="count">${count}</span>`}
      </button>
      <${ShareMenu} session=${session} packed=${packed} />
      <button type="button" class="quiet" disabled=${busy || !turns.length}
        onClick=${() => leave({ turns: [] })}><${Icon} name="plus" />New</button>
    </div>
    ${settings && html`<${Settings} session=${session} change=${change} />`}`;
}

const Welcome = ({ say, columns }) => html`
  <div class="empty">
    <h2>One model, many tasks</h2>
    <p>Ask once: ${columns === 1 ? "the column answers" : `all ${columns} columns answer together, in one batch`}.
      Each task is a small file that edits what the model thinks of your prompt.</p>
    <div class="examples">
      ${EXAMPLES.map((text) => html`
        <button type="button" key=${text} onClick=${() => say(text)}>${text}</button>`)}
    </div>
  </div>`;

function Turn({ turn, t, session, busy, last, onEdit, onAnswer }) {
  const [edited, setEdited] = useState(null);
  const article = useRef();
  const box = useRef();
  const pen = useRef();
  useEffect(() => {
    if (last && busy) article.current.scrollIntoView({ block: "nearest" });
  }, []);
  // The focus follows the way into the text, and out of it.
  const editing = edited !== null;
  const edits = useRef(false);
  useLayoutEffect(() => {
    if (editing !== edits.current) (editing ? box : busy ? article : pen).current.focus();
    edits.current = editing;
  }, [editing]);
  const { columns } = session;
  const run = () => {
    setEdited(null);
    onEdit(edited);
  };
  return html`
    <article ref=${article} tabindex="-1" class="turn" aria-label=${`Turn ${t + 1}`}>
      <div class="asked">
        ${!editing
          ? html`<p class="said" tabindex=${turn.user.length > LONG ? 0 : null}>${turn.user}</p>
              <span class="asked-actions">
                <${IconButton} icon="edit" focus=${pen} label="Edit this turn" disabled=${busy}
                  onClick=${() => setEdited(turn.user)} />
                ${last && html`<${IconButton} icon="reset" label="Answer again" disabled=${busy}
                  onClick=${() => onAnswer(columns.map((_, c) => c))} />`}
              </span>`
          : html`<form class="editing" onSubmit=${(event) => { event.preventDefault(); run(); }}>
              <textarea aria-label="The turn's text" ref=${box} rows="3" value=${edited}
                onInput=${(event) => setEdited(event.target.value)}></textarea>
              <div class="actions">
                <button type="button" onClick=${() => setEdited(null)}>Cancel</button>
                <button class="primary" disabled=${busy || !edited.trim()}>Ask this instead</button>
              </div>
            </form>`}
      </div>
      <div class=${classes("columns", `of-${columns.length}`)}>
        ${columns.map((one, c) => html`
          <${Answer} key=${c} answer=${turn.answers[c]} name=${title(one)} c=${c} t=${t}
            colour=${session.colour} busy=${busy} last=${last}
            onAnswer=${() => onAnswer([c])} />`)}
      </div>
    </article>`;
}

const ENDS = {
  probability: ["likely", "unlikely", "p"],
  distance: ["as the base", "far from it", "d"],
};

function Legend({ colour }) {
  const [least, most, letter] = ENDS[colour];
  return html`
    <span class="legend">${least}
      ${[0, 1, 2, 3, 4].map((n) => html`<i class=${`${letter}${n}`} key=${n}></i>`)}
      ${most}
    </span>`;
}

/** What a screen reader says without being asked: that columns answer, and then what they have answered. */
function Spoken({ turns, busy }) {
  const [asked, setAsked] = useState(false);
  useEffect(() => setAsked(asked || busy), [busy]);
  const given = turns.at(-1)?.answers.filter((one) => one?.of && one.text) ?? [];
  const said = given.map(({ of, text }) => `${of}: ${text}`).join("\n");
  return html`<p class="unseen" role="status">${busy ? "Answering…" : asked && said}</p>`;
}

function Composer({ mode, busy, onSay, onStop, again }) {
  const { text } = useStore(draft);
  const setText = (typed) => draft.set({ text: typed });
  const submit = (event) => {
    event.preventDefault();
    if (busy || !text.trim()) return;
    onSay(text);
    if (mode === "chat") setText("");
  };
  // Enter sends a chat's turn; in a text it begins a new line.
  const keys = (event) => {
    const enter = event.key === "Enter" && !composes(event);
    if (enter && (event.ctrlKey || event.metaKey || (mode === "chat" && !event.shiftKey))) submit(event);
  };
  const hint = mode === "text" ? "Text to continue" : again ? "Go on" : "Ask something";
  return html`
    <form class="composer" onSubmit=${submit}>
      <textarea rows=${mode === "text" ? 4 : 2} value=${text} placeholder=${`${hint}…`}
        aria-label=${hint} onKeyDown=${keys}
        onInput=${(event) => setText(event.target.value)}></textarea>
      <${RunButton} label="Run" disabled=${!text.trim()} onStop=${busy && onStop} />
    </form>`;
}
