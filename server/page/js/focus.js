// The focus of what is removed: what is beside or around it takes it, so that nobody begins at the top again.

/** The element that had the focus last, and all around it. */
let path = [];

addEventListener("focusin", (event) => (path = event.composedPath()));

new MutationObserver((records) => {
  if (document.activeElement !== document.body || path[0]?.isConnected !== false) return;
  const near = beside(records) ?? path.find((one) => one.isConnected).closest?.("li, section, article, dialog");
  if (!near) return;
  if (near.tabIndex < 0) near.tabIndex = -1; // what no key comes to
  near.focus({ preventScroll: true });
}).observe(document.body, { childList: true, subtree: true });

/** The first link or button beside an item of a list or a row of a table that was removed, if there is one. */
function beside(records) {
  const isLost = (one) => one.matches?.("li, tr") && !one.isConnected && path.includes(one);
  const lost = records.find(({ removedNodes }) => [...removedNodes].some(isLost));
  return (lost?.nextSibling ?? lost?.previousSibling)?.querySelector("a, button:enabled");
}
