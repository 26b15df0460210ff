// The one comparison of this page. It outlives its view: answers go on while another is open.

import { forTab } from "./kept.js";
import { column, newSession } from "./session.js";
import { Store } from "./store.js";

/**
 * State of the comparison. `running` is the AbortController of the answers under way; `dialog` is what share.js shows:
 * {kind: "copy" | "paste", c, t}.
 */
export const comparison = new Store({ session: null, running: null, problem: null, dialog: null });

const DRAFT = "reft-draft";

/** What was typed and not sent yet. It outlives the view, and a reload of the tab. */
export const draft = new Store({ text: forTab.get(DRAFT) ?? "" });

addEventListener("pagehide", () => forTab.set(DRAFT, draft.value.text));

/** Change fields of the session. */
export function change(fields) {
  comparison.set({ session: { ...comparison.value.session, ...fields } });
}

/** Show another session instead, and abort the answers under way. */
export function replace(session) {
  comparison.value.running?.abort();
  comparison.set({ session, problem: null });
}

/** "Try it": the base beside one intervention, with the settings as they are. */
export function tryOut(name) {
  const session = comparison.value.session ?? newSession();
  replace({ ...session, columns: [column(), column(name)], turns: [] });
}
