// What every module takes from the vendored libraries: Preact, its hooks, and htm bound to it.

import { h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export { render, Fragment } from "./vendor/preact.js";
export {
  useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState,
} from "./vendor/preact-hooks.js";

export const html = htm.bind(h);

/** Class names joined, without those that are false. */
export const classes = (...names) => names.filter(Boolean).join(" ");
