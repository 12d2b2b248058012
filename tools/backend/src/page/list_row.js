// Makes one row of the list.

import { element, setAttribute, setText, tracePath } from "./dom.js";
import { age, clock, count, duration, short } from "./format.js";
import { coloured } from "./services.js";

/** How many services of a trace are named. Anybody can send a trace of thousands of services. */
const MOST_SERVICES = 50;

/** Returns `{ element, update(summary), tick() }`. `tick` updates the age. */
export function traceRow(summary) {
  const service = element("span", { class: "service" });
  const operation = element("span", { class: "operation" });
  const link = element("a", { href: tracePath(summary.traceID), tabindex: -1 }, service, " ", operation);
  const id = element("span", { class: "id" }, summary.traceID.slice(0, 8));
  const status = element("td", { class: "status" });
  const services = element("td", { class: "services" });
  const spans = element("td", { class: "number spans" });
  const errors = element("td", { class: "errors" });
  const took = element("td", { class: "number took" });
  const when = element("time");
  const row = element(
    "tr",
    {},
    element("td", { class: "name" }, link, id),
    status,
    services,
    spans,
    errors,
    took,
    element("td", { class: "number age" }, when),
  );
  let shown = "";
  let start = 0;

  function update(summary) {
    const now = JSON.stringify(summary);
    if (now === shown) return;
    shown = now;
    start = summary.start;
    setText(service, short(summary.service || "(no service)"));
    setText(operation, short(summary.operation || "(no root yet)"));
    setAttribute(link, "title", short(`${summary.service} ${summary.operation}`, 1000));
    setText(status, short(summary.status, 40));
    status.classList.toggle("refused", !/^(|OK|[123]\d\d)$/.test(summary.status));
    services.replaceChildren(...summary.services.slice(0, MOST_SERVICES).map(chip));
    const more = summary.services.length - MOST_SERVICES;
    if (more > 0) services.append(`and ${count(more, "service")} more`);
    setText(spans, count(summary.spans, "span"));
    setText(errors, summary.errors ? count(summary.errors, "error") : "");
    row.classList.toggle("failed", summary.errors > 0);
    setText(took, duration(summary.duration));
    setAttribute(when, "title", clock(start));
    tick();
  }

  function tick() {
    setText(when, age(start));
  }

  update(summary);
  return { element: row, update, tick };
}

function chip({ name, spans }) {
  const label = short(name || "(no service)", 40);
  return coloured(element("span", { class: "chip" }, label, " ", element("b", {}, String(spans))), name);
}
