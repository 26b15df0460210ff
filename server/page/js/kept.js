// What the browser keeps for this page. Where it keeps nothing, all storage being blocked, the page itself
// does, until it is loaded again.

class Kept {
  #storage = null;
  #texts = new Map();

  /** `find` gives the browser's storage, or throws. */
  constructor(find) {
    try {
      this.#storage = find();
    } catch {
      // It is blocked.
    }
  }

  /** The text under a name; null if there is none. */
  get(name) {
    return this.#texts.get(name) ?? this.#storage?.getItem(name) ?? null;
  }

  set(name, text) {
    this.delete(name);
    try {
      this.#storage.setItem(name, text);
    } catch {
      this.#texts.set(name, text); // it is blocked, or the text is longer than what is kept
    }
  }

  delete(name) {
    this.#texts.delete(name);
    this.#storage?.removeItem(name);
  }
}

/** Kept for good. */
export const forGood = new Kept(() => localStorage);

/** Kept until the tab is closed. */
export const forTab = new Kept(() => sessionStorage);
