// A value that outlives the views that show it: an answer goes on streaming while another is open.

import { useEffect, useState } from "./lib.js";

export class Store {
  #listeners = new Set();
  #frame = 0;

  constructor(value) {
    this.value = value;
  }

  /** Change some fields, and redraw now. */
  set(fields) {
    this.value = { ...this.value, ...fields };
    this.#tell();
  }

  /** Redraw once, with the next frame, after a change within the value. */
  touched() {
    this.#frame ||= requestAnimationFrame(() => {
      this.value = { ...this.value };
      this.#tell();
    });
  }

  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  #tell() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    for (const listener of this.#listeners) listener(this.value);
  }
}

/** The store's value; the component is drawn again when it changes. */
export function useStore(store) {
  const [, draw] = useState(store.value);
  useEffect(() => {
    draw(store.value);
    return store.subscribe(draw);
  }, [store]);
  return store.value;
}
