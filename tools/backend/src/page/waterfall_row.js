// Makes one row of the waterfall: a span's place in the tree, and its bar.

import { element, setAttribute, setText } from "./dom.js";
import { count, duration, short } from "./format.js";
import { colour } from "./services.js";

/** Marks on a bar that are closer than this share of the whole trace are drawn as one mark. */
const RESOLUTION = 1 / 500;

/** Returns `{ element, show(span, trace, isCollapsed) }`. Rows are reused for other spans. */
export function row() {
  const indent = element("span", { class: "indent", "aria-hidden": "true" });
  const twist = element("span", { class: "twist", "aria-hidden": "true" });
  const service = element("span", { class: "service" });
  const operation = element("span", { class: "operation" });
  const note = element("span", { class: "note" });
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
    kind,
  );
  const time = element("div", { class: "time", role: "gridcell" }, bar, label);
  const node = element("div", { role: "row" }, name, time);

  function show(span, trace, isCollapsed) {
    node.className = `row ${colour(span.service)}`;
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
    setText(kind, span.kind);
    setAttribute(name, "title", short(`${span.service} ${span.name}`, 1000));
    showTime(span, trace);
  }

  function showTime(span, trace) {
    const whole = trace.duration || 1;
    const from = (span.start - trace.start) / whole;
    const to = (span.end - trace.start) / whole;
    bar.style.left = `${from * 100}%`;
    bar.style.width = `${(to - from) * 100}%`;
    bar.replaceChildren(...marks(span, whole));
    setText(label, duration(span.duration));
    const side = to < 0.86 ? "after" : from > 0.14 ? "before" : "inside";
    label.dataset.side = side;
    label.style.left = side === "after" ? `${to * 100}%` : "";
    label.style.right = side === "after" ? "" : `${(1 - (side === "before" ? from : to)) * 100}%`;
    setAttribute(
      time,
      "aria-label",
      `${duration(span.duration)}, starts at ${duration(span.start - trace.start)}`,
    );
  }

  return { element: node, show, span: null, index: -1 };
}

function notes(span, isCollapsed) {
  const said = [];
  if (span.error) said.push("error");
  if (span.orphan) said.push("parent missing");
  if (span.links.length) said.push(count(span.links.length, "link"));
  if (isCollapsed) said.push(`+${span.descendants}`);
  return said.join(" · ");
}

function marks(span, whole) {
  const within = (time) => Math.min(Math.max((time - span.start) / (span.duration || 1), 0), 1);
  const drawn = [];
  for (const [from, to] of merged(span.critical, whole * RESOLUTION)) {
    const mark = element("i", { class: "critical" });
    mark.style.left = `${within(from) * 100}%`;
    mark.style.width = `${(within(to) - within(from)) * 100}%`;
    drawn.push(mark);
  }
  const times = span.events.map(({ time }) => [time, time]).sort((a, b) => a[0] - b[0]);
  for (const [time] of merged(times, whole * RESOLUTION)) {
    const mark = element("i", { class: "event" });
    mark.style.left = `${within(time) * 100}%`;
    drawn.push(mark);
  }
  return drawn;
}

function merged(intervals, gap) {
  const wide = [];
  for (const [from, to] of intervals) {
    const last = wide.at(-1);
    if (last && from - last[1] < gap) last[1] = to;
    else wide.push([from, to]);
  }
  return wide;
}
