// Makes one row of the waterfall: a span's place in the tree, and its bar.

import { element, setAttribute, setText } from "./dom.js";
import { count, duration, short } from "./format.js";
import { coloured } from "./services.js";

/** Marks that are closer than this share of the axis are drawn as one mark. */
const RESOLUTION = 1 / 500;

/** Returns `{ element, show(span, axis, isCollapsed) }`. Rows are reused for other spans. */
export function row() {
  const indent = element("span", { class: "indent", "aria-hidden": "true" });
  const twist = element("span", { class: "twist", "aria-hidden": "true" });
  const service = element("span", { class: "service" });
  const operation = element("span", { class: "operation" });
  const note = element("span", { class: "note" });
  const outcome = element("span", { class: "outcome" });
  const kind = element("span", { class: "kind" });
  const bar = element("div", { class: "bar-of-span" });
  const label = element("span", { class: "took" });
  const name = element(
    "div",
    { class: "name", role: "gridcell" },
    indent,
    twist,
    service,
    operation,
    note,
    outcome,
    kind,
  );
  const time = element("div", { class: "time", role: "gridcell" });
  const node = element("div", { role: "row" }, name, time);

  function show(span, axis, isCollapsed) {
    node.className = "row";
    coloured(node, span.service);
    node.classList.toggle("failed", span.error);
    node.classList.toggle("found", Boolean(span.found));
    setAttribute(node, "aria-level", span.depth + 1);
    setAttribute(node, "aria-posinset", span.position);
    setAttribute(node, "aria-setsize", span.siblings);
    setAttribute(node, "aria-expanded", span.children.length > 0 && String(!isCollapsed));
    node.style.setProperty("--depth", span.depth);
    setText(twist, span.children.length ? (isCollapsed ? "▸" : "▾") : "");
    setText(service, short(span.service || "(no service)"));
    setText(operation, short(span.name || "(no name)"));
    setText(note, notes(span, isCollapsed));
    setText(outcome, short(span.outcome, 100));
    outcome.classList.toggle("failed", span.error || span.refused);
    setText(kind, span.kind);
    setAttribute(name, "title", short(`${span.service} ${span.name} ${span.outcome}`, 1000));
    showTime(span, axis);
  }

  function showTime(span, axis) {
    const [from, to] = [axis.place(span.start), axis.place(span.end)];
    const [left, right] = [within(from), within(to)];
    const isBefore = to < 0;
    const isAfter = from > 1;
    bar.hidden = isBefore || isAfter;
    bar.style.left = `${left * 100}%`;
    bar.style.width = `${(right - left) * 100}%`;
    time.replaceChildren(bar, ...marks(span, axis), label);
    setText(label, `${isBefore ? "◂ " : ""}${duration(span.duration)}${isAfter ? " ▸" : ""}`);
    const side = right < 0.86 ? "after" : left > 0.14 ? "before" : "inside";
    label.dataset.side = side;
    label.style.left = side === "after" ? `${right * 100}%` : "";
    label.style.right = side === "after" ? "" : `${(1 - (side === "before" ? left : right)) * 100}%`;
    setAttribute(
      time,
      "aria-label",
      `${duration(span.duration)}, starts at ${duration(span.start - axis.trace.start)}`,
    );
  }

  return { element: node, show, span: null, index: -1 };
}

const within = (place) => Math.min(Math.max(place, 0), 1);

function notes(span, isCollapsed) {
  const said = [];
  if (span.orphan) said.push("parent missing");
  const links = span.links.length + span.linked.length;
  if (links) said.push(count(links, "link"));
  if (isCollapsed) said.push(`+${span.descendants}`);
  return said.join(" · ");
}

/** Returns the marks of the critical path and of the events that are on the shown part of the axis. */
function marks(span, axis) {
  const times = span.events.map(({ time }) => Math.min(Math.max(time, span.start), span.end));
  const events = times.sort((a, b) => a - b).map((time) => [time, time]);
  return [
    ...merged(span.critical, axis).map(([from, to]) => mark("critical", from, to)),
    ...merged(events, axis).map(([place]) => mark("event", place, place)),
  ];
}

function mark(name, from, to) {
  const mark = element("i", { class: name });
  mark.style.left = `${from * 100}%`;
  if (to > from) mark.style.width = `${(to - from) * 100}%`;
  return mark;
}

/** Returns the places of times on the axis, without those out of sight. Times that are close to each other are merged. */
function merged(times, axis) {
  const wide = [];
  for (const [start, end] of times) {
    const [from, to] = [axis.place(start), axis.place(end)];
    const last = wide.at(-1);
    if (to < 0 || from > 1) continue;
    if (last && from - last[1] < RESOLUTION) last[1] = within(to);
    else wide.push([within(from), within(to)]);
  }
  return wide;
}
