// Keeps the search form and the URL equal, so that a search can be kept as a link. The parameters are those of Jaeger's
// own search page and API.

import { byId, element } from "./dom.js";
import { operations, services } from "./api.js";

const CRITERIA = ["service", "operation", "tags", "minDuration", "maxDuration", "traceID"];

/** Returns the criteria from the URL, for the API. */
export function criteria() {
  const parameters = new URLSearchParams(location.search);
  const given = {};
  for (const name of [...CRITERIA, "limit"]) {
    const value = parameters.get(name)?.trim();
    if (value) given[name] = value;
  }
  return given;
}

/** Returns whether the URL has any criteria besides the limit. */
export const isSearching = () => CRITERIA.some((name) => name in criteria());

/** Keeps the form and the URL equal, and calls `changed()` when the criteria change. */
export function searchForm(changed) {
  const form = byId("search");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  form.addEventListener("change", () => form.checkValidity() && search());
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
    for (const name of CRITERIA) {
      const value = form.elements[name].value.trim();
      if (!value) continue;
      parameters.set(name, name === "tags" ? JSON.stringify(parseTags(value)) : value);
    }
    const query = parameters.size ? `?${parameters}` : "";
    if (query === location.search) return;
    history.pushState(null, "", location.pathname + query);
    changed();
  }

  function fillIn() {
    const given = criteria();
    for (const name of CRITERIA) form.elements[name].value = given[name] ?? "";
    form.elements.tags.value = formatTags(given.tags);
    choose(form.elements.service, given.service ?? "");
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
