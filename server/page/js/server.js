// Server: what is served, and how it is doing now, asked again every two seconds; and what was used.

import { ask } from "./api.js";
import { Chart } from "./chart.js";
import { classes, html, useEffect } from "./lib.js";
import { Store, useStore } from "./store.js";
import { Loading, Problem, Segmented, bytes, number, percent, seconds } from "./ui.js";
import { Usage } from "./usage.js";
import { who } from "./who.js";

const EVERY_MS = 2000;
const SHOWN_S = 300;

/** The answers of the last five minutes, oldest first; they are kept while another view is open. */
const watched = new Store({ samples: [], error: null });

async function look(signal) {
  try {
    const sample = await ask("v1/stats", { signal });
    const recent = watched.value.samples.filter(({ time }) => time > sample.time - SHOWN_S);
    watched.set({ samples: [...recent, sample], error: null });
  } catch (error) {
    if (error.name !== "AbortError") watched.set({ error });
  }
}

/** Asks the server as long as the view is open and the tab is visible. */
function useWatch() {
  useEffect(() => {
    const controller = new AbortController();
    let timer;
    const next = async () => {
      if (!document.hidden) await look(controller.signal);
      if (!controller.signal.aborted) timer = setTimeout(next, EVERY_MS);
    };
    next();
    return () => {
      controller.abort();
      clearTimeout(timer);
    };
  }, []);
}

const PARTS = [["", "Now"], ["usage", "Usage"]];

export function ServerView({ rest }) {
  const { me } = useStore(who);
  if (!me.sees_server) return html`<${Own} me=${me} />`;
  const turn = (part) => (location.hash = part ? `#/server/${part}` : "#/server");
  return html`
    <div class="head">
      <h1>Server</h1>
      <${Segmented} label="What to show" value=${rest} options=${PARTS} onChange=${turn} />
      ${rest !== "usage" && html`<${Status} />`}
    </div>
    ${rest === "usage" ? html`<${Usage} />` : html`<${Now} />`}`;
}

/** For those who are told of themselves alone. */
const Own = ({ me }) => html`
  <div class="head"><h1>Usage of ${me.tenant}</h1></div>
  <${Usage} own />
  <p class="muted">${me.role === "admin"
    ? `What the whole server does is told to admins that see all interventions, and ${me.tenant} sees some.`
    : `What the whole server does is told to admins, and ${me.tenant} is a user.`}</p>`;

/** Whether the server is ready, since when it is up. */
function Status() {
  const { samples, error } = useStore(watched);
  const now = samples.at(-1);
  if (!now) return null;
  const ready = now.status === "ok" && !error;
  return html`
    <span class=${classes("status", ready ? "good" : "bad")} role="status">
      ${error ? "not reached" : ready ? "ready" : now.status}</span>
    <span class="muted">up ${duration(now.uptime_seconds)}, version ${now.version}</span>`;
}

function Now() {
  useWatch();
  const { samples, error } = useStore(watched);
  const now = samples.at(-1);
  if (!now) return error ? html`<${Problem} error=${error} />` : html`<${Loading} what="the server's numbers" />`;
  return html`
    ${error && html`<${Problem} error=${error} />`}
    ${now.problems.map((message) => html`<${Problem} key=${message} error=${{ message }} />`)}
    <dl class="facts panel tiles">
      ${tiles(now).map(([what, value, more]) => html`
        <div key=${what}><dt>${what}</dt><dd>${value} <small>${more}</small></dd></div>`)}
    </dl>
    <div class="charts">${charts(samples)}</div>`;
}

function tiles(now) {
  const { kv_cache: cache, interventions, finished } = now;
  const failed = finished.error ?? 0;
  return [
    ["Base model", now.model, `${now.dtype} on ${now.device}`],
    ["Interventions", number(interventions.registered), `${number(interventions.loaded)} in memory, ${bytes(interventions.bytes)}`],
    ["Running", `${now.running} of ${now.max_running}`, `${number(now.waiting)} waiting`],
    ["Key-value cache", percentage(cache.usage), `of ${number(cache.tokens)} tokens, ${bytes(cache.bytes)}`],
    ["Tokens made", number(now.generation_tokens), `for ${number(now.prompt_tokens)} of prompts`],
    ["Requests ended", number(Object.values(finished).reduce((sum, count) => sum + count, 0)),
      failed ? `${number(failed)} by a fault` : "none by a fault"],
  ];
}

function charts(samples) {
  const xs = samples.map(({ time }) => time);
  const column = (read) => samples.map((sample) => read(sample) ?? null);
  const hits = samples.map((sample, i) => hitRate(samples[i - 1], sample));
  const common = { xs, formatX: (time) => ago(xs.at(-1) - time) };
  const first = "time_to_first_token_seconds";
  const between = "time_per_output_token_seconds";
  const all = [
    ["Tokens a second", (value) => value.toFixed(value < 10 ? 1 : 0), {}, [
      ["generated", column((one) => one.tokens_per_second.generation)],
      ["prompt", column((one) => one.tokens_per_second.prompt)]]],
    ["Requests", (value) => `${Math.round(value)}`, {}, [
      ["running", column((one) => one.running)], ["waiting", column((one) => one.waiting)]]],
    ["Cache", percentage, { max: 1 }, [
      ["in use", column((one) => one.kv_cache.usage)], ["hit rate", hits]]],
    ["First token", seconds, {}, [
      ["median", column((one) => one[first].p50)], ["p95", column((one) => one[first].p95)]]],
    ["Between tokens", seconds, {}, [
      ["median", column((one) => one[between].p50)], ["p95", column((one) => one[between].p95)]]],
  ];
  return all.map(([title, format, more, series]) => html`
    <${Chart} key=${title} title=${title} format=${format} ...${common} ...${more}
      series=${series.map(([name, values]) => ({ name, values }))} />`);
}

/** The prefix cache's hit rate between two samples: tokens found over tokens looked for. */
function hitRate(before, after) {
  if (!before?.prefix_cache || !after.prefix_cache) return null;
  const queries = after.prefix_cache.queries - before.prefix_cache.queries;
  return queries > 0 ? (after.prefix_cache.hits - before.prefix_cache.hits) / queries : null;
}

const percentage = (share) => (share > 0 && share < 0.1 ? percent(share) : `${Math.round(share * 100)} %`);

const ago = (time) => (time < 1 ? "now" : `${Math.round(time)} s ago`);

function duration(time) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const i = units.findIndex(([, size]) => time >= size);
  const [unit, size] = units[i < 0 ? 3 : i];
  const whole = Math.floor(time / size);
  const below = i >= 0 && i < 2 ? units[i + 1] : null;
  return below ? `${whole} ${unit} ${Math.floor((time - whole * size) / below[1])} ${below[0]}` : `${whole} ${unit}`;
}
