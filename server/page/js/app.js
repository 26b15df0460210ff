// The frame of the page: which view is open.

import { ask } from "./api.js";
import { Compare } from "./compare.js";
import { html, render, useEffect, useState } from "./lib.js";
import { Interventions } from "./interventions.js";
import { Look } from "./look.js";
import { ServerView } from "./server.js";
import { Store, useStore } from "./store.js";
import { Frame } from "./frame.js";
import { Loading, Problem } from "./ui.js";

const VIEWS = {
  compare: ["Compare", Compare],
  look: ["Look inside", Look],
  interventions: ["Interventions", Interventions],
  server: ["Server", ServerView],
};

/** State of the page; `model` is the base model's name. */
const app = new Store({ model: null, error: null });

async function begin() {
  app.set({ error: null });
  try {
    const { model } = await ask("v1/stats");
    app.set({ model });
  } catch (error) {
    app.set({ error });
  }
}

/** The open view, and what follows it in the address: `#/compare/STATE`. */
function place() {
  const [, view, ...rest] = location.hash.split("/");
  return { view: view in VIEWS ? view : "compare", rest: rest.join("/") };
}

function App() {
  const { model, error } = useStore(app);
  const [{ view, rest }, setPlace] = useState(place);
  useEffect(() => {
    const changed = () => setPlace(place());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  const [title, View] = VIEWS[view];
  useEffect(() => {
    document.title = `${title} · ${model ?? "reft-server"}`;
  }, [title, model]);
  const links = Object.entries(VIEWS).map(([name, [text]]) => [`./#/${name}`, text, name === view]);
  return html`
    <${Frame} links=${[...links, ["docs", "API", false]]} model=${model}>
      ${model
        ? html`<${View} base=${model} rest=${rest} key=${view} />`
        : error
          ? html`<${Problem} error=${error} retry=${begin} />`
          : html`<${Loading} what="the server's model" />`}
    <//>`;
}

render(html`<${App} />`, document.getElementById("app"));
begin();
