// The page of one trace.

import * as api from "./api.js";
import { showDetails } from "./details.js";
import { byId, copyButton, element, setText, tracePath } from "./dom.js";
import { coalesced, follow } from "./events.js";
import { finder } from "./find.js";
import { clock, count, duration, short } from "./format.js";
import { onKeys } from "./keys.js";
import { showOverview } from "./overview.js";
import { totals } from "./services.js";
import { arrange } from "./tree.js";
import { Waterfall } from "./waterfall.js";

const traceID = decodeURIComponent(location.pathname.split("/").pop()).toLowerCase();
const side = byId("side");
let trace = null;
/** The key of the span whose details are shown, or empty. */
let selected = "";

const waterfall = new Waterfall(byId("waterfall"), { activated: moveTo, chosen: (span) => select(span) });
const find = finder({ marked: () => waterfall.redraw(), go });

const refresh = coalesced(async () => {
  try {
    const found = await api.trace(traceID);
    if (found) show(arrange(found));
    byId("trace").hidden = trace === null;
    byId("missing").hidden = trace !== null;
    byId("failure").hidden = true;
  } catch (error) {
    // `follow` already shows when the backend doesn't respond.
    if (!(error instanceof api.Refused)) return;
    setText(byId("failure"), error.message);
    byId("failure").hidden = false;
  }
}, 250);

function show(next) {
  trace = next;
  byId("trace").hidden = false;
  showSummary();
  find.search(trace);
  waterfall.show(trace);
  const span = spanByKey(selected || spanInURL());
  if (span && !selected) waterfall.reveal(span);
  select(span, { keepURL: true });
}

function showSummary() {
  const { root } = trace;
  const errors = trace.spans.filter((span) => span.error).length;
  const services = totals(trace).length;
  document.title = `${short(root.service, 60)} ${short(root.name, 100)} · Throughline`;
  byId("title").replaceChildren(
    element("b", {}, short(root.service)),
    " ",
    element("span", {}, short(root.name)),
  );
  const copies = [
    copyButton("Copy id", trace.traceID),
    copyButton("Copy link", new URL(tracePath(trace.traceID) ?? "", location).href),
  ];
  const jaeger = document.querySelector("meta[name=jaeger]")?.content;
  if (jaeger) copies.push(element("a", { href: `${jaeger}/trace/${trace.traceID}` }, "Open in Jaeger"));
  const facts = [
    ["Trace", element("span", { class: "id" }, trace.traceID), ...copies],
    ["Start", clock(trace.start)],
    ["Duration", duration(trace.duration)],
    ["Spans", count(trace.spans.length, "span")],
    ["Services", count(services, "service")],
    ["Errors", element("span", { class: errors ? "failed" : "" }, count(errors, "error"))],
  ];
  byId("facts").replaceChildren(
    ...facts.map(([name, ...values]) =>
      element("div", {}, element("dt", { class: "unseen" }, name), element("dd", {}, ...values)),
    ),
  );
}

/** If details are open, shows those of the span that the user moved to. */
function moveTo(span) {
  if (selected) select(span);
}

function select(span, { keepURL = false } = {}) {
  const changed = (span?.key ?? "") !== selected;
  selected = span?.key ?? "";
  waterfall.select(selected);
  if (span) showDetails(side, trace, span, { go: goFromSide, close: () => goFromSide(null) });
  else showOverview(side, trace);
  if (changed) side.scrollTop = 0;
  if (!keepURL)
    history.replaceState(null, "", location.pathname + location.search + (span ? `#${span.id}` : ""));
}

function go(span) {
  waterfall.reveal(span);
  select(span);
}

/** Moves the focus to the waterfall, because the pressed button, which had the focus, is gone. */
function goFromSide(span) {
  if (span) go(span);
  else select(null);
  waterfall.focus();
}

function nextError() {
  const from = trace.spans.indexOf(waterfall.active);
  const after = [...trace.spans.slice(from + 1), ...trace.spans.slice(0, from + 1)];
  const span = after.find((span) => span.error);
  if (span) go(span);
}

function spanByKey(key) {
  return trace.spans.find((span) => span.key === key) ?? null;
}

function spanInURL() {
  return /^#([0-9a-f]{1,16})$/i.exec(location.hash)?.[1].toLowerCase() ?? "";
}

/** Undoes one step: leaves the find field, closes the details, shows the whole trace, or goes back to the list. */
function escape() {
  if (document.activeElement === byId("find-text")) waterfall.focus();
  else if (selected) select(null);
  else if (trace && waterfall.isZoomed) waterfall.showWhole();
  else location.assign("/");
}

addEventListener("hashchange", () => {
  const span = trace && spanByKey(spanInURL());
  if (span) go(span);
});
onKeys({
  "/": () => byId("find-text").select(),
  e: () => trace && nextError(),
  z: () => trace && waterfall.zoomToActive(),
  "+": () => trace && waterfall.zoomBy(0.5),
  "-": () => trace && waterfall.zoomBy(2),
  0: () => trace && waterfall.showWhole(),
  "[": () => trace && waterfall.move(-0.5),
  "]": () => trace && waterfall.move(0.5),
  ArrowDown: () => waterfall.focus(),
  ArrowUp: () => waterfall.focus(),
  Escape: escape,
});
setText(byId("missing-id"), short(traceID, 64));
follow({
  changed: (changed) => (trace === null || changed === trace.traceID) && refresh(),
  connected: refresh,
});
