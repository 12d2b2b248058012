// The list of recent traces.

import { recentTraces, Refused } from "./api.js";
import { byId, copyButton, setText } from "./dom.js";
import { coalesced, follow } from "./events.js";
import { count } from "./format.js";
import { onKeys } from "./keys.js";
import { traceRow } from "./list_row.js";
import { criteria, isSearching, searchForm, turnTo } from "./search.js";

/** How many traces the list shows at most, unless the URL has another limit. */
const LIMIT = 100;

const table = byId("traces");
const body = byId("rows");
const pending = byId("pending");
/** The rows in the list, by trace id. */
const rows = new Map();
/** The latest answer of the backend. The list may be older (see `held`). */
let latest = { traces: [], total: 0 };
/** How many traces there were in total when the list was arranged. */
let arranged = 0;
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

const offset = () => Number(criteria().offset) || 0;
const limit = () => Number(criteria().limit) || LIMIT;

/**
 * Returns whether the user points at the list, moves through it by keys, has scrolled, or has turned the page. Then no
 * row may move.
 */
function held() {
  const isBusy = hovered || body.contains(document.activeElement) || scrollY > 0 || offset() > 0;
  return rows.size > 0 && isBusy;
}

/** Shows the latest summaries. If the list is held, only the existing rows are updated. */
function show(isHeld) {
  const { traces, total } = latest;
  for (const summary of traces) {
    const row = rows.get(summary.traceID);
    if (row) row.update(summary);
  }
  // On a later page, new traces also push traces of the page before into this one.
  const unseen = offset() > 0 ? 0 : traces.filter((summary) => !rows.has(summary.traceID)).length;
  if (!isHeld) arrange();
  const waiting = isHeld ? Math.max(unseen, total - arranged) : 0;
  pending.hidden = waiting === 0;
  setText(pending, `Show ${waiting} new`);
  const first = offset() + 1;
  const range = total > traces.length ? `${first}–${first - 1 + traces.length} of ` : "";
  setText(byId("count"), total ? range + count(total, "trace") : "");
  byId("previous").hidden = first === 1;
  byId("next").hidden = first - 1 + traces.length >= total;
  byId("no-traces").hidden = rows.size > 0 || isSearching();
  byId("no-match").hidden = rows.size > 0 || !isSearching();
  table.hidden = rows.size === 0;
}

function arrange() {
  const first = rows.size === 0;
  arranged = latest.total;
  const wanted = new Set(latest.traces.map((summary) => summary.traceID));
  for (const [traceID, row] of rows) {
    if (wanted.has(traceID)) continue;
    row.element.remove();
    rows.delete(traceID);
  }
  latest.traces.forEach((summary, index) => {
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
  if (offset() > 0) turn(-offset());
  else show(false);
}

/** Shows another page, so many traces further. */
function turn(by) {
  if (by === 0 || byId(by < 0 ? "previous" : "next").hidden) return;
  turnTo(Math.max(offset() + by, 0));
  scrollTo(0, 0);
  restart();
}

function restart() {
  for (const row of rows.values()) row.element.remove();
  rows.clear();
  refresh();
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
byId("previous").addEventListener("click", () => turn(-limit()));
byId("next").addEventListener("click", () => turn(limit()));
byId("copy").append(copyButton("Copy", byId("curl").textContent) ?? "");

onKeys({
  "/": () => byId("search").elements.service.focus(),
  ".": showPending,
  "[": () => turn(-limit()),
  "]": () => turn(limit()),
  ArrowDown: () => focusTrace((current, length) => Math.min(current + 1, length - 1)),
  ArrowUp: () => focusTrace((current) => Math.max(current - 1, 0)),
  Home: () => focusTrace(() => 0),
  End: () => focusTrace((current, length) => length - 1),
  Escape: () => document.activeElement?.blur(),
});
searchForm(restart);
follow({ changed: refresh, connected: refresh });
setInterval(() => rows.forEach((row) => row.tick()), 1000);
