// The frame of the page: which view is open.

import { Compare } from "./compare.js";
import { html, render, useEffect, useState } from "./lib.js";
import { Interventions } from "./interventions.js";
import { Look } from "./look.js";
import { ServerView } from "./server.js";
import { useStore } from "./store.js";
import { Frame } from "./frame.js";
import { Loading, Problem } from "./ui.js";
import { introduce, who } from "./who.js";

const VIEWS = {
  compare: ["Compare", Compare],
  look: ["Look inside", Look],
  interventions: ["Interventions", Interventions],
  server: ["Server", ServerView],
};

/** The open view, and what follows it in the address: `#/compare/STATE`. */
function place() {
  const [, view, ...rest] = location.hash.split("/");
  return { view: view in VIEWS ? view : "compare", rest: rest.join("/") };
}

function App() {
  const { me, error } = useStore(who);
  const model = me?.model;
  const [visit, setVisit] = useState(place);
  const { view, rest } = visit;
  useEffect(() => {
    const changed = () => setVisit(place());
    addEventListener("popstate", changed);
    return () => removeEventListener("popstate", changed);
  }, []);
  const [title, View] = VIEWS[view];
  useEffect(() => {
    document.title = `${title} · ${model ?? "reft-server"}`;
  }, [title, model]);
  const links = Object.entries(VIEWS).map(([name, [text]]) => [`./#/${name}`, text, name === view]);
  return html`
    <${Frame} links=${[...links, ["docs", "API", false]]} me=${me}>
      ${model
        ? html`<${View} base=${model} rest=${rest} visit=${visit} key=${view} />`
        : error
          ? html`<${Problem} error=${error} retry=${introduce} />`
          : html`<${Loading} what="the page" />`}
    <//>`;
}

// A file that is dropped beside what takes one must not be opened in the place of the page.
for (const what of ["dragover", "drop"]) {
  addEventListener(what, (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
}

render(html`<${App} />`, document.getElementById("app"));
introduce();
