// Keeps the search form and the URL equal, so that a search can be kept as a link. The parameters are those of Jaeger's
// own search page and API.

import { byId, element } from "./dom.js";
import { operations, services } from "./api.js";
import { clock } from "./format.js";

const CRITERIA = [
  "service",
  "operation",
  "tags",
  "lookback",
  "start",
  "end",
  "minDuration",
  "maxDuration",
  "traceID",
];

/** Returns the criteria from the URL, and which of the traces to show, for the API. */
export function criteria() {
  const parameters = new URLSearchParams(location.search);
  const given = {};
  for (const name of [...CRITERIA, "limit", "sort", "offset"]) {
    const value = parameters.get(name)?.trim();
    if (value) given[name] = value;
  }
  // Jaeger's page writes both, but a look back always ends now.
  if (given.lookback && given.lookback !== "custom") {
    delete given.start;
    delete given.end;
  }
  return given;
}

/** Returns whether the URL has any criteria. */
export const isSearching = () => CRITERIA.some((name) => name in criteria());

/** Keeps the form and the URL equal, and calls `changed()` when the criteria change. */
export function searchForm(changed) {
  const form = byId("search");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  for (const field of form.elements) {
    field.addEventListener("change", () => {
      showRange();
      if (form.checkValidity()) search();
    });
  }
  form.elements.service.addEventListener("focus", offerServices);
  form.elements.operation.addEventListener("focus", offerOperations);
  addEventListener("popstate", () => {
    fillIn();
    changed();
  });
  fillIn();
  offerServices();

  function search() {
    const parameters = new URLSearchParams();
    for (const name of [...CRITERIA, "sort"]) {
      const field = form.elements[name];
      const value = field.value.trim();
      if (!value || field.parentElement.hidden) continue;
      parameters.set(name, WRITE[name]?.(value) ?? value);
    }
    const query = parameters.size ? `?${parameters}` : "";
    if (query === location.search) return;
    history.pushState(null, "", location.pathname + query);
    changed();
  }

  function fillIn() {
    const given = criteria();
    if (given.start || given.end) given.lookback ??= "custom";
    for (const name of [...CRITERIA, "sort"]) {
      const value = READ[name]?.(given[name]) ?? given[name] ?? "";
      if (form.elements[name] instanceof HTMLSelectElement) choose(form.elements[name], value);
      else form.elements[name].value = value;
    }
    showRange();
  }

  function showRange() {
    for (const label of form.querySelectorAll(".custom")) label.hidden = form.elements.lookback.value !== "custom";
  }

  async function offerServices() {
    const select = form.elements.service;
    const names = await services().catch(() => []);
    const chosen = select.value;
    select.replaceChildren(option("", "any"), ...names.map((name) => option(name, name)));
    choose(select, chosen);
  }

  async function offerOperations() {
    const service = form.elements.service.value;
    const names = service ? await operations(service).catch(() => []) : [];
    byId("operations").replaceChildren(...names.map((name) => option(name)));
  }
}

/** Shows another page of the same search. */
export function turnTo(offset) {
  const parameters = new URLSearchParams(location.search);
  if (offset > 0) parameters.set("offset", offset);
  else parameters.delete("offset");
  history.pushState(null, "", `${location.pathname}${parameters.size ? `?${parameters}` : ""}`);
}

/** How a field's value becomes a parameter, if it is not the same. Times are in microseconds since 1970. */
const WRITE = {
  tags: (text) => JSON.stringify(parseTags(text)),
  start: (local) => new Date(local).getTime() * 1000,
  end: (local) => new Date(local).getTime() * 1000,
};

/** How a parameter becomes the field's value. */
const READ = { tags: formatTags, start: localTime, end: localTime };

/** Returns a time as a field of type `datetime-local` has it. */
function localTime(micros) {
  return micros > 0 && micros < 8e18 ? clock(Number(micros)).slice(0, 19).replace(" ", "T") : "";
}

const option = (value, label) => element("option", { value }, label);

/** Selects a value, even if the backend doesn't know it (yet). */
function choose(select, value) {
  if (![...select.options].some((known) => known.value === value)) select.append(option(value, value));
  select.value = value;
}

/** Parses `a=b c="d e"` into an object. A word without `=` stands for `word=true`. */
export function parseTags(input) {
  const tags = {};
  for (const [, key, , quoted, plain] of input.matchAll(/([^\s=]+)(=(?:"((?:[^"\\]|\\.)*)"|(\S*)))?/g)) {
    const value = quoted?.replace(/\\(.)/g, "$1") ?? plain ?? "true";
    Object.defineProperty(tags, key, { value, enumerable: true });
  }
  return tags;
}

/** Does the reverse of `parseTags`: formats the JSON from the URL as a person types it. */
function formatTags(json = "{}") {
  let tags;
  try {
    tags = JSON.parse(json);
  } catch {
    return json;
  }
  if (typeof tags !== "object" || tags === null) return json;
  return Object.entries(tags)
    .map(([key, value]) => `${key}=${/^[^\s"]+$/.test(value) ? value : JSON.stringify(String(value))}`)
    .join(" ");
}
