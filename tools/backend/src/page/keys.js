// Handles keys that work anywhere on a page, and the help that lists them.

import { byId } from "./dom.js";

/**
 * `{ "/": action, Escape: action, … }`: calls an action when its key is pressed. While somebody types in a field, only
 * Escape counts.
 */
export function onKeys(actions) {
  const help = byId("help");
  const all = { "?": () => help.showModal(), ...actions };
  byId("help-button").addEventListener("click", () => help.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const typing = event.target.closest("input, select, textarea");
    if (typing && event.key !== "Escape") return;
    if (!Object.hasOwn(all, event.key)) return;
    event.preventDefault();
    all[event.key](event);
  });
}
