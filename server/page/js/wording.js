// Layers, times and tiers as people say them.

/** Where an intervention's tensors are, by its tier. */
export const PLACES = { disk: "on disk", host: "in memory" };

/** Layers as text, such as "0 to 3, 6"; evenly spaced ones as "every 2nd of 1 to 29". */
export function spans(layers) {
  const step = layers[1] - layers[0];
  const even = layers.every((layer, i) => i === 0 || layer - layers[i - 1] === step);
  if (layers.length > 4 && even && step > 1) {
    return `every ${step}${{ 2: "nd", 3: "rd" }[step] ?? "th"} of ${layers[0]} to ${layers.at(-1)}`;
  }
  const runs = [];
  for (const layer of layers) {
    if (runs.length && layer === runs.at(-1)[1] + 1) runs.at(-1)[1] = layer;
    else runs.push([layer, layer]);
  }
  return runs.map(([from, to]) => (from === to ? from : `${from} to ${to}`)).join(", ");
}

/** A text in quotes on one line, its middle left out where it is long. */
export function quoted(text) {
  const whole = JSON.stringify(text);
  return whole.length > 240 ? `${whole.slice(0, 160)} … ${whole.slice(-60)}` : whole;
}

/** Unix time (seconds) as a date, or as a time of day if it is today. */
export function when(time) {
  const date = new Date(time * 1000);
  const today = date.toDateString() === new Date().toDateString();
  return today
    ? date.toLocaleTimeString("en-GB", { timeStyle: "short" })
    : date.toLocaleDateString("en-GB", { dateStyle: "medium" });
}
