// The search form and the URL, which say the same: a search can be kept as a link. The parameters are those of
// Jaeger's own search page and API.

import { byId, element } from "./dom.js";
import { operations, services } from "./api.js";

const CRITERIA = ["service", "operation", "tags", "minDuration", "maxDuration", "traceID"];

/** The criteria that the URL holds, for the API. */
export function criteria() {
  const parameters = new URLSearchParams(location.search);
  const given = {};
  for (const name of [...CRITERIA, "limit"]) {
    const value = parameters.get(name)?.trim();
    if (value) given[name] = value;
  }
  return given;
}

/** Whether the URL asks for anything in particular. */
export const isSearching = () => CRITERIA.some((name) => name in criteria());

/** Keeps form and URL the same, and calls `changed()` when they come to say something else. */
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

/** Selects a value, which the backend may not know (yet). */
function choose(select, value) {
  if (![...select.options].some((known) => known.value === value)) select.append(option(value, value));
  select.value = value;
}

/** `a=b c="d e"` as an object; a word without `=` stands for `word=true`. */
export function parseTags(input) {
  const tags = {};
  for (const [, key, , quoted, plain] of input.matchAll(/([^\s=]+)(=(?:"((?:[^"\\]|\\.)*)"|(\S*)))?/g)) {
    const value = quoted?.replace(/\\(.)/g, "$1") ?? plain ?? "true";
    Object.defineProperty(tags, key, { value, enumerable: true });
  }
  return tags;
}

/** The reverse: from the URL's JSON to what a person types. */
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
