// Shows the details of one span: everything that it contains, unchanged.

import { breakable, element, tracePath } from "./dom.js";
import { clock, count, duration, percent } from "./format.js";
import { colour } from "./services.js";
import { criticalTime } from "./timing.js";

/** Fills `side`. `go(span)` moves to another span of the trace; `close()` goes back to the overview. */
export function showDetails(side, trace, span, { go, close }) {
  side.className = "details";
  side.replaceChildren(
    header(span, close),
    facts(trace, span, go),
    ...section("Attributes", span.attributes.length > 0 && table(span.attributes)),
    ...section(count(span.events.length, "event"), span.events.length > 0 && events(trace, span)),
    ...section(count(span.logs.length, "log record"), span.logs.length > 0 && logs(trace, span)),
    ...section(count(span.links.length, "link"), span.links.length > 0 && links(span)),
    ...section("Warnings", span.warnings.length > 0 && lines(span.warnings)),
    ...section("Resource", span.resource.length > 0 && table(span.resource)),
  );
}

function header(span, close) {
  const button = element(
    "button",
    { type: "button", "aria-label": "Close the details", title: "Close (Esc)" },
    "×",
  );
  button.addEventListener("click", close);
  const service = element("span", { class: "service" }, span.service || "(no service)");
  const operation = element("span", { class: "operation" }, ...breakable(span.name || "(no name)"));
  return element(
    "header",
    { class: colour(span.service) },
    element("h2", {}, service, " ", operation),
    button,
  );
}

function facts(trace, span, go) {
  const critical = criticalTime(span);
  const rows = [
    ["Kind", span.kind || "not said"],
    [
      "Status",
      span.error ? element("span", { class: "failed" }, `error ${span.errorDescription}`) : "no error",
    ],
    ["Start", said(`+${duration(span.start - trace.start)}`, clock(span.start))],
    ["Duration", said(duration(span.duration), `${percent(span.duration, trace.duration)} of the trace`)],
    ["Self time", said(duration(span.selfTime), "without its children")],
    [
      "Critical path",
      critical ? said(duration(critical), `${percent(critical, trace.root.duration)} of it`) : "not on it",
    ],
    ["Span id", link(trace.traceID, span.id)],
    ["Parent", parent(span, go)],
  ];
  return element(
    "dl",
    {},
    ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
  );
}

function said(value, remark) {
  return element("span", {}, value, " ", element("span", { class: "quiet" }, remark));
}

function parent(span, go) {
  if (!span.parent)
    return span.parentID ? element("span", { class: "id" }, `${span.parentID} (not in this trace)`) : "none";
  const button = element(
    "button",
    { type: "button", class: "link" },
    `${span.parent.service} ${span.parent.name}`,
  );
  button.addEventListener("click", () => go(span.parent));
  return button;
}

function section(title, content) {
  return content ? [element("h3", {}, title), content] : [];
}

function table(attributes) {
  const rows = attributes.map(({ key, value }) =>
    element("tr", {}, element("th", { scope: "row" }, ...breakable(key)), element("td", {}, value)),
  );
  return element("table", {}, element("tbody", {}, ...rows));
}

function events(trace, span) {
  return timeline("events", trace, span.events, ({ name }) => [element("b", {}, name || "(no name)")]);
}

function logs(trace, span) {
  return timeline("logs", trace, span.logs, ({ severity, body }) => [
    element("b", { class: /^(error|fatal)/i.test(severity) ? "failed" : false }, severity),
    " ",
    element("span", { class: "body" }, body),
  ]);
}

/** Lists items in the order of their time. `said(item)` returns the text beside the time. */
function timeline(name, trace, items, said) {
  const lines = [...items]
    .sort((a, b) => a.time - b.time)
    .map((item) =>
      element(
        "li",
        {},
        element("span", { class: "when" }, `+${duration(Math.max(item.time - trace.start, 0))}`),
        " ",
        ...said(item),
        item.attributes.length ? table(item.attributes) : null,
      ),
    );
  return element("ul", { class: name }, ...lines);
}

function links(span) {
  const items = span.links.map(({ traceID, spanID, type }) =>
    element(
      "li",
      {},
      link(traceID, spanID),
      " ",
      element("span", { class: "quiet" }, type.toLowerCase().replace("_", " ")),
    ),
  );
  return element("ul", {}, ...items);
}

function lines(texts) {
  return element("ul", {}, ...texts.map((text) => element("li", {}, text)));
}

/** Returns a link to a span, or plain text if the ids are invalid. */
function link(traceID, spanID) {
  const path = tracePath(traceID, spanID);
  const label = path?.startsWith(location.pathname) ? spanID : `${traceID} ${spanID}`;
  return path ? element("a", { href: path, class: "id" }, label) : element("span", { class: "id" }, label);
}
