// The list of recent traces.

import { recentTraces, Refused } from "./api.js";
import { byId, setText } from "./dom.js";
import { coalesced, follow } from "./events.js";
import { count } from "./format.js";
import { onKeys } from "./keys.js";
import { traceRow } from "./list_row.js";
import { criteria, isSearching, searchForm } from "./search.js";

/** How many traces the list shows at most, unless the URL has another limit. */
const LIMIT = 100;

const table = byId("traces");
const body = byId("rows");
const pending = byId("pending");
/** The rows in the list, by trace id. */
const rows = new Map();
/** The latest summaries from the backend. The list may be older (see `held`). */
let latest = [];
let hovered = false;

const refresh = coalesced(async () => {
  try {
    latest = await recentTraces({ limit: LIMIT, ...criteria() });
    show(held());
  } catch (error) {
    // `follow` already shows when the backend doesn't respond.
    if (error instanceof Refused) setText(byId("count"), error.message);
  }
}, 250);

/** Returns whether the user points at the list, moves through it by keys, or has scrolled. Then no row may move. */
function held() {
  return rows.size > 0 && (hovered || body.contains(document.activeElement) || scrollY > 0);
}

/** Shows the latest summaries. If the list is held, only the existing rows are updated. */
function show(isHeld) {
  for (const summary of latest) {
    const row = rows.get(summary.traceID);
    if (row) row.update(summary);
  }
  const unseen = latest.filter((summary) => !rows.has(summary.traceID)).length;
  if (!isHeld) arrange();
  const waiting = isHeld ? unseen : 0;
  pending.hidden = waiting === 0;
  setText(pending, `Show ${waiting} new`);
  setText(
    byId("count"),
    latest.length ? `${latest.length < LIMIT ? "" : "the latest "}${count(latest.length, "trace")}` : "",
  );
  byId("no-traces").hidden = rows.size > 0 || isSearching();
  byId("no-match").hidden = rows.size > 0 || !isSearching();
  table.hidden = rows.size === 0;
}

function arrange() {
  const first = rows.size === 0;
  const wanted = new Set(latest.map((summary) => summary.traceID));
  for (const [traceID, row] of rows) {
    if (wanted.has(traceID)) continue;
    row.element.remove();
    rows.delete(traceID);
  }
  latest.forEach((summary, index) => {
    let row = rows.get(summary.traceID);
    if (!row) {
      row = traceRow(summary);
      row.element.classList.toggle("new", !first);
      rows.set(summary.traceID, row);
    }
    const there = body.children[index];
    if (there !== row.element) body.insertBefore(row.element, there ?? null);
  });
  const links = [...body.querySelectorAll("a")];
  if (!links.some((link) => link.tabIndex === 0) && links[0]) links[0].tabIndex = 0;
}

function showPending() {
  document.activeElement?.blur();
  hovered = false;
  scrollTo(0, 0);
  show(false);
}

/** Moves the focus for the arrow keys. Only one link of the list is in the Tab order at a time. */
function focusTrace(choose) {
  const links = [...body.querySelectorAll("a")];
  const current = links.indexOf(document.activeElement);
  const link = links[choose(current, links.length)];
  if (!link) return;
  for (const other of links) other.tabIndex = other === link ? 0 : -1;
  link.focus();
}

table.addEventListener("pointerenter", () => (hovered = true));
table.addEventListener("pointerleave", () => {
  hovered = false;
  show(held());
});
body.addEventListener("focusout", () => setTimeout(() => show(held())));
addEventListener("scroll", () => scrollY === 0 && show(held()), { passive: true });
pending.addEventListener("click", showPending);
byId("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(byId("curl").textContent);
  setText(byId("copy"), "Copied");
});
// A browser lets a page write to the clipboard only if the page is local or uses TLS.
byId("copy").hidden = !navigator.clipboard;

onKeys({
  "/": () => byId("search").elements.service.focus(),
  ".": showPending,
  ArrowDown: () => focusTrace((current, length) => Math.min(current + 1, length - 1)),
  ArrowUp: () => focusTrace((current) => Math.max(current - 1, 0)),
  Home: () => focusTrace(() => 0),
  End: () => focusTrace((current, length) => length - 1),
  Escape: () => document.activeElement?.blur(),
});
searchForm(() => {
  for (const row of rows.values()) row.element.remove();
  rows.clear();
  refresh();
});
follow({ changed: refresh, connected: refresh });
setInterval(() => rows.forEach((row) => row.tick()), 1000);
