// Shows the details of one span: everything that it contains, unchanged.

import { breakable, copyButton, element, spanLink } from "./dom.js";
import { clock, count, duration, percent, short } from "./format.js";
import { coloured } from "./services.js";
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
    ...section(count(span.links.length, "link"), span.links.length > 0 && links(span.links)),
    ...section("Linked from other traces", span.linked.length > 0 && links(span.linked)),
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
  const title = element("h2", {}, service, " ", operation);
  return coloured(element("header", {}, title, button), span.service);
}

function facts(trace, span, go) {
  const critical = criticalTime(span);
  const rows = [
    ["Kind", span.kind || "not said"],
    [
      "Status",
      span.error
        ? element("span", { class: "failed" }, `error ${span.errorDescription || span.outcome}`)
        : element("span", { class: span.refused ? "failed" : "" }, span.outcome || "no error"),
    ],
    ["Start", said(`+${duration(span.start - trace.start)}`, clock(span.start))],
    ["Duration", said(duration(span.duration), `${percent(span.duration, trace.duration)} of the trace`)],
    ["Self time", said(duration(span.selfTime), "without its children")],
    [
      "Critical path",
      critical ? said(duration(critical), `${percent(critical, trace.root.duration)} of it`) : "not on it",
    ],
    ["Span id", ids(trace, span)],
    ["Parent", parent(span, go)],
  ];
  return element(
    "dl",
    {},
    ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
  );
}

function ids(trace, span) {
  const link = spanLink({ traceID: trace.traceID, spanID: span.id });
  const copies = [copyButton("Copy id", span.id), copyButton("Copy link", link.href ?? location.href)];
  return element("span", { class: "ids" }, link, ...copies);
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
    element(
      "tr",
      { class: /\n/.test(value) && "lines" },
      element("th", { scope: "row" }, ...breakable(key)),
      element("td", { tabindex: /\n/.test(value) && 0 }, value),
    ),
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

/** Lists links to spans, or from spans. */
export function links(links) {
  const items = links.map((link) =>
    element("li", {}, spanLink(link), " ", element("span", { class: "quiet" }, short(link.remark))),
  );
  return element("ul", {}, ...items);
}

function lines(texts) {
  return element("ul", {}, ...texts.map((text) => element("li", {}, text)));
}
