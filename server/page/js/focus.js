// The focus of what is removed: the section, turn or dialog around it takes it, so that nobody begins at the top again.

/** The element that had the focus last, and all around it. */
let path = [];

addEventListener("focusin", (event) => (path = event.composedPath()));

new MutationObserver(() => {
  if (document.activeElement !== document.body || path[0]?.isConnected !== false) return;
  const near = path.find((one) => one.isConnected).closest?.("section, article, dialog");
  if (!near) return;
  near.tabIndex = -1;
  near.focus({ preventScroll: true });
}).observe(document.body, { childList: true, subtree: true });
