// What surrounds every view, including the reference: the name, the links, the colours, the key.

import { forgetKey, key, onKeyNeeded } from "./api.js";
import "./focus.js";
import { forGood } from "./kept.js";
import { html, useState } from "./lib.js";
import { Store, useStore } from "./store.js";
import { Dialog, Icon, IconButton, number } from "./ui.js";
import { introduce, seen, who } from "./who.js";

const THEME = "reft-theme";

/** What the key's dialog is open for: {refused, done}, or null. */
const gate = new Store({ asking: null });

onKeyNeeded(
  (refused) =>
    new Promise((resolve) => {
      const done = (given) => {
        gate.set({ asking: null });
        resolve(given);
        // Another key may be another tenant's; the request that waited for it takes it first.
        if (given && who.value.me) setTimeout(introduce);
      };
      if (refused) forgetKey();
      gate.set({ asking: { refused, done } });
    }),
);

applyTheme(forGood.get(THEME));

function applyTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

const dark = () => {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function ThemeButton() {
  const [isDark, setDark] = useState(dark);
  const change = () => {
    const theme = isDark ? "light" : "dark";
    forGood.set(THEME, theme);
    applyTheme(theme);
    setDark(!isDark);
  };
  return html`<${IconButton} icon=${isDark ? "sun" : "moon"} onClick=${change}
    label=${isDark ? "Light colours" : "Dark colours"} />`;
}

const forget = () => {
  forgetKey();
  location.reload();
};

/** What surrounds a view. `links` are [address, text, whether it is open]; `me` is the tenant, if known. */
export function Frame({ links, me, children }) {
  const { asking } = useStore(gate);
  const [open, setOpen] = useState(false);
  return html`
    <a class="skip" href="#main" onClick=${toMain}>Skip to the content</a>
    <header class="top">
      <a class="brand" href="./#/compare">
        <${Mark} /><span>reft<span class="brand-rest">-server</span></span>
      </a>
      <nav aria-label="Views">
        ${links.map(([address, text, open]) => html`
          <a href=${address} key=${text} aria-current=${open ? "page" : null}>${text}</a>`)}
      </nav>
      <div class="top-end">
        ${me && html`<span class="model" title="The base model">${me.model}</span>`}
        ${key() && html`
          <button type="button" class="quiet who" aria-haspopup="dialog" onClick=${() => setOpen(true)}>
            ${me ? html`<span>${me.tenant}</span> <small>${me.role}</small>` : "Key"}</button>`}
        <${ThemeButton} />
      </div>
    </header>
    <main id="main" tabindex="-1">${children}</main>
    ${open && html`<${KeyDetails} me=${me} onClose=${() => setOpen(false)} />`}
    ${asking && html`<${KeyDialog} ...${asking} />`}`;
}

const QUOTAS = {
  requests_per_minute: "requests a minute", tokens_per_minute: "tokens a minute", concurrent_requests: "requests at a time",
};

/** Whose key the page uses, what it may do, and the way to forget it. */
function KeyDetails({ me, onClose }) {
  return html`
    <${Dialog} title=${me ? `The key of ${me.tenant}` : "The key"} onClose=${onClose}>
      <div class="stack">
        ${me && html`<dl class="rights">${rights(me).map(([what, value]) => html`
          <div key=${what}><dt>${what}</dt><dd>${value}</dd></div>`)}</dl>`}
        <p class="muted">It is kept until this tab is closed.</p>
        <div class="actions"><button type="button" onClick=${forget}>Forget key</button></div>
      </div>
    <//>`;
}

function rights(me) {
  const { max_tokens, n } = me.limits;
  const limits = [
    ...Object.entries(QUOTAS).filter(([name]) => me[name] !== null).map(([name, words]) => `${number(me[name])} ${words}`),
    ...(max_tokens ? [`answers of ${number(max_tokens)} tokens`] : []),
    ...(n ? [`${number(n)} choices`] : []),
  ];
  return [
    ["Role", me.role],
    ["Sees", seen(me).join(", ") || "the base model alone"],
    ["Changes", !me.upload ? "nothing" : me.prefix ? `${me.prefix}*` : "what it sees"],
    ["Limits", limits.join(", ") || "none"],
  ];
}

// The address holds the open view, so the link to the main part must not change it.
function toMain(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

const Mark = () => html`
  <svg viewBox="0 0 32 32" class="mark" aria-hidden="true">
    <path d="M4 8h24M4 16h24M4 24h24" />
    <circle cx="11" cy="8" r="4" /><circle cx="21" cy="16" r="4" /><circle cx="15" cy="24" r="4" />
  </svg>`;

/** Asks for the key of a server that needs one; `done(null)` where none is given. */
function KeyDialog({ refused, done }) {
  const [given, setGiven] = useState("");
  const submit = (event) => {
    event.preventDefault();
    if (given.trim()) done(given.trim());
  };
  return html`
    <${Dialog} title="This server needs a key" onClose=${() => done(null)}>
      <form onSubmit=${submit} class="stack">
        <p>It is sent as <code>Authorization: Bearer</code> and kept until this tab is closed.</p>
        ${refused && html`<p class="problem" role="alert">The server did not take that key.</p>`}
        <label class="field">API key
          <input type="password" autocomplete="off" autofocus value=${given}
            onInput=${(event) => setGiven(event.target.value)} />
        </label>
        <div class="actions"><button class="primary"><${Icon} name="play" />Use this key</button></div>
      </form>
    <//>`;
}
