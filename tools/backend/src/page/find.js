// Finds spans by any text that they contain. The text is in the URL as `uiFind`, as on Jaeger's page.

import { byId, setText } from "./dom.js";

/**
 * Returns a finder, whose `search` marks matching spans as `found`. When the user types, spans are marked as well, and
 * `marked()` is called. Enter calls `go(span)` with the next match.
 */
export function finder({ marked, go }) {
  const input = byId("find-text");
  let trace = null;
  let found = [];
  let current = -1;
  input.value = new URLSearchParams(location.search).get("uiFind") ?? "";

  function search(newTrace = trace) {
    trace = newTrace;
    const wanted = input.value.trim().toLowerCase();
    for (const span of trace.spans) span.found = wanted !== "" && holds(span, wanted);
    found = trace.spans.filter((span) => span.found);
    tell(wanted);
  }

  function tell(wanted) {
    const position = current >= 0 ? `${current + 1} of ${found.length}` : `${found.length} found`;
    setText(byId("found"), wanted ? position : "");
  }

  input.addEventListener("input", () => {
    current = -1;
    const url = new URL(location);
    if (input.value.trim()) url.searchParams.set("uiFind", input.value.trim());
    else url.searchParams.delete("uiFind");
    history.replaceState(null, "", url);
    if (!trace) return;
    search();
    marked();
  });
  byId("find").addEventListener("submit", (event) => event.preventDefault());
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || found.length === 0) return;
    event.preventDefault();
    const step = event.shiftKey ? -1 : 1;
    current = current < 0 && step < 0 ? found.length - 1 : (current + step + found.length) % found.length;
    tell(input.value);
    go(found[current]);
  });
  return { search };
}

function holds(span, wanted) {
  const has = (value) => value.toLowerCase().includes(wanted);
  const tagged = ({ key, value }) => has(key) || has(value);
  return (
    [span.name, span.service, span.kind, span.id, span.errorDescription].some(has) ||
    span.attributes.some(tagged) ||
    span.events.some((event) => has(event.name) || event.attributes.some(tagged)) ||
    span.logs.some((record) => has(record.body) || record.attributes.some(tagged))
  );
}
