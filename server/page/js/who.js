// Who uses the page: the tenant of its key, and what it may do. And the base model's name.

import { allow, ask } from "./api.js";
import { boundAnswers } from "./session.js";
import { Store } from "./store.js";

/** `me` is what v1/me answers; null until it did. */
export const who = new Store({ me: null, error: null });

export async function introduce() {
  who.set({ error: null });
  try {
    const me = await ask("v1/me");
    allow(me.concurrent_requests);
    boundAnswers(me.limits.max_tokens);
    who.set({ me });
  } catch (error) {
    who.set({ error });
  }
}

/** Whether the tenant may change an intervention that it sees. */
export const mayChange = (name) => {
  const { upload, prefix } = who.value.me;
  return upload && name.startsWith(prefix ?? "");
};

/** The name that an uploaded file is to have: a tenant's own begin with its prefix. */
export const proposed = (name) => (mayChange(name) ? name : `${who.value.me.prefix}${name}`);

/** The patterns of the names that a tenant sees: also those of its own, which it need not list. */
export function seen({ interventions, upload, prefix }) {
  return upload && prefix ? [...new Set([...interventions, `${prefix}*`])] : interventions;
}
