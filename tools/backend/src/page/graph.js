// Draws which service called which, as SVG. Callers are on the left, and each further step of calls has its own column.

import { element, svg } from "./dom.js";
import { count, short } from "./format.js";
import { coloured } from "./services.js";

const BOX = { width: 116, height: 40 };
const GAP = { x: 52, y: 14 };
const EDGE = 2;

/** Draws services (`totals`) and the calls between them (`calls`). */
export function serviceGraph(services, calls) {
  const places = place(services, calls);
  const width = Math.max(...[...places.values()].map(({ x }) => x)) + BOX.width + EDGE;
  const height = Math.max(...[...places.values()].map(({ y }) => y)) + BOX.height + EDGE;
  const sentences = calls.map(({ from, to, count: times }) => `${from} calls ${to} ${count(times, "time")}`);
  const drawing = svg(
    "svg",
    {
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      "aria-label": short(sentences.join(", ") || "no calls between services", 2000),
    },
    svg(
      "defs",
      {},
      svg(
        "marker",
        {
          id: "arrow",
          viewBox: "0 0 8 8",
          refX: 8,
          refY: 4,
          markerWidth: 7,
          markerHeight: 7,
          orient: "auto",
        },
        svg("path", { d: "M0 0 8 4 0 8z" }),
      ),
    ),
    ...calls.map((call) => edge(call, places)),
    ...services.map((service) => box(service, places.get(service.name))),
  );
  return element("div", { class: "graph" }, drawing);
}

/** Places each service one column to the right of its rightmost caller. Calls back to a caller's caller don't count. */
function place(services, calls) {
  const columns = new Map();
  const onTheWay = new Set();
  const callers = (name) => calls.filter((call) => call.to === name).map((call) => call.from);
  const column = (name) => {
    if (columns.has(name)) return columns.get(name);
    onTheWay.add(name);
    const left = callers(name)
      .filter((caller) => !onTheWay.has(caller))
      .map(column);
    onTheWay.delete(name);
    const found = left.length ? Math.max(...left) + 1 : 0;
    columns.set(name, found);
    return found;
  };
  const filled = [];
  const places = new Map();
  for (const { name } of services) {
    const x = column(name);
    const y = filled[x] ?? 0;
    filled[x] = y + 1;
    places.set(name, { x: EDGE + x * (BOX.width + GAP.x), y: EDGE + y * (BOX.height + GAP.y) });
  }
  return places;
}

function box({ name, spans, errors }, { x, y }) {
  const node = svg(
    "g",
    { class: "box", transform: `translate(${x} ${y})` },
    svg("title", {}, short(name, 1000)),
    svg("rect", { width: BOX.width, height: BOX.height, rx: 4 }),
    svg("rect", { class: "stripe", width: 4, height: BOX.height, rx: 1 }),
    svg("text", { x: 12, y: 17, class: "service" }, short(name || "(no service)", 13)),
    svg(
      "text",
      { x: 12, y: 32, class: "quiet" },
      count(spans, "span"),
      errors ? svg("tspan", { class: "failed" }, `  ${count(errors, "error")}`) : null,
    ),
  );
  return coloured(node, name);
}

function edge({ from, to, count: times, errors, message }, places) {
  const start = places.get(from);
  const end = places.get(to);
  const y = [start.y + BOX.height / 2, end.y + BOX.height / 2];
  const back = end.x <= start.x;
  // A call back leaves and arrives on the left sides, in an arc around the services in between.
  const x = back ? [start.x, end.x] : [start.x + BOX.width, end.x];
  const bend = back ? [x[0] - GAP.x / 2, x[1] - GAP.x / 2] : [x[0] + GAP.x / 2, x[1] - GAP.x / 2];
  return svg(
    "g",
    { class: `edge${errors ? " failed" : ""}${message ? " message" : ""}` },
    svg("path", {
      d: `M${x[0]} ${y[0]} C${bend[0]} ${y[0]} ${bend[1]} ${y[1]} ${x[1]} ${y[1]}`,
      "marker-end": "url(#arrow)",
    }),
    svg("text", { x: (x[0] + x[1]) / 2 + (back ? -GAP.x / 3 : 0), y: (y[0] + y[1]) / 2 - 4 }, `${times}×`),
  );
}
