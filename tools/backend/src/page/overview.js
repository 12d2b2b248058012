// Shows the services of the trace beside the waterfall, while no span is selected.

import { links } from "./details.js";
import { element } from "./dom.js";
import { count, duration, percent, short } from "./format.js";
import { serviceGraph } from "./graph.js";
import { calls, coloured, totals } from "./services.js";

/** With more services than this, there is no graph, which would be unreadable. The table lists all services. */
const MOST_IN_GRAPH = 40;

/** Fills `side`. */
export function showOverview(side, trace) {
  const services = totals(trace);
  const made = calls(trace);
  side.className = "overview";
  side.replaceChildren(element("h2", {}, "Services"));
  if (services.length <= MOST_IN_GRAPH) side.append(serviceGraph(services, made));
  side.append(
    table(services),
    legend("path", "critical path: what the end waited for"),
    legend("tick", "event"),
  );
  if (trace.linked.length) side.append(element("h2", {}, "Linked from other traces"), links(trace.linked));
  if (trace.warnings.length === 0) return;
  side.append(element("h2", {}, "Warnings"), ...trace.warnings.map((text) => element("p", {}, text)));
}

function legend(sample, text) {
  return element("p", { class: "legend" }, element("span", { class: `sample ${sample}` }), text);
}

function table(services) {
  const whole = services.reduce((sum, service) => sum + service.selfTime, 0);
  const rows = services.map(({ name, spans, errors, selfTime }) => {
    const row = element(
      "tr",
      {},
      element("th", { scope: "row" }, short(name || "(no service)", 80)),
      element("td", { class: "number" }, String(spans)),
      element("td", { class: errors ? "failed number" : "number" }, errors ? String(errors) : ""),
      element("td", { class: "number" }, duration(selfTime)),
      element("td", { class: "number quiet" }, percent(selfTime, whole)),
    );
    return coloured(row, name);
  });
  const titles = [
    ["Service", ""],
    ["Spans", "number"],
    ["Errors", "number"],
    ["Self time", "number"],
    ["", "number"],
  ];
  const head = element(
    "tr",
    {},
    ...titles.map(([title, kind]) => element("th", { scope: "col", class: kind }, title)),
  );
  return element(
    "table",
    { "aria-label": count(services.length, "service") },
    element("thead", {}, head),
    element("tbody", {}, ...rows),
  );
}
