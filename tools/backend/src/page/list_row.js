// Makes one row of the list.

import { element, setAttribute, setText, tracePath } from "./dom.js";
import { age, clock, count, duration, short } from "./format.js";
import { colour } from "./services.js";

/** Returns `{ element, update(summary), tick() }`. `tick` updates the age. */
export function traceRow(summary) {
  const service = element("span", { class: "service" });
  const operation = element("span", { class: "operation" });
  const link = element("a", { href: tracePath(summary.traceID), tabindex: -1 }, service, " ", operation);
  const id = element("span", { class: "id" }, summary.traceID.slice(0, 8));
  const services = element("td", { class: "services" });
  const spans = element("td", { class: "number" });
  const errors = element("td", { class: "errors" });
  const took = element("td", { class: "number" });
  const when = element("time");
  const row = element(
    "tr",
    {},
    element("td", { class: "name" }, link, id),
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
    services.replaceChildren(...summary.services.slice(0, 8).map(chip));
    if (summary.services.length > 8) services.append(` +${summary.services.length - 8}`);
    setText(spans, String(summary.spans));
    setAttribute(spans, "aria-label", count(summary.spans, "span"));
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
  return element(
    "span",
    { class: `chip ${colour(name)}` },
    short(name || "(no service)", 40),
    " ",
    element("b", {}, String(spans)),
  );
}
