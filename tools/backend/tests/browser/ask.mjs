// Questions that the checks ask a page.

import assert from "node:assert/strict";

/** Repeats `ask` until it returns the expected answer, for at most a minute. */
export async function eventually(ask, expected) {
  const deadline = Date.now() + 60_000;
  let answer;
  do {
    // The element may not be in the document yet.
    answer = await ask().catch((error) => error);
    if (JSON.stringify(answer) === JSON.stringify(expected)) return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  } while (Date.now() < deadline);
  if (answer instanceof Error) throw answer;
  assert.deepEqual(answer, expected);
}

/** Returns the trace ids in the list, from the top. */
export const listed = (page) =>
  page.$$eval("#rows a", (links) => links.map((link) => link.getAttribute("href").slice("/trace/".length)));

/** Returns the rows of the waterfall, from the top. */
export const rows = (page) =>
  page.$$eval("#rows .row", (nodes) =>
    nodes
      .map((node) => ({
        index: Number(node.getAttribute("aria-rowindex")) - 2,
        level: Number(node.getAttribute("aria-level")),
        place: `${node.getAttribute("aria-posinset")}/${node.getAttribute("aria-setsize")}`,
        expanded: node.getAttribute("aria-expanded"),
        service: node.querySelector(".service").textContent,
        name: node.querySelector(".operation").textContent,
        kind: node.querySelector(".kind").textContent,
        note: node.querySelector(".note").textContent,
        outcome: node.querySelector(".outcome").textContent,
      }))
      .sort((a, b) => a.index - b.index),
  );

/** Returns the names of the rows' spans, indented by their level. */
export const tree = async (page) =>
  (await rows(page)).map(({ level, name }) => "  ".repeat(level - 1) + name);

/** Returns the name of the active row's span. */
export const active = (page) =>
  page.$eval("#waterfall", (grid) => {
    const row = document.getElementById(grid.getAttribute("aria-activedescendant"));
    return row?.querySelector(".operation").textContent;
  });

/** Returns the title of the details or of the overview. */
export const beside = (page) => page.$eval("#side h2", (title) => title.textContent);

/** Returns the text in the details under a title such as "Self time". */
export const fact = (page, title) =>
  page.$eval(
    "#side dl",
    (facts, title) => {
      const term = [...facts.querySelectorAll("dt")].find((term) => term.textContent === title);
      return term?.nextElementSibling.textContent;
    },
    title,
  );

/** Opens the details of the span with this name. */
export const openDetails = (page, name) =>
  page
    .locator(".row", { has: page.locator(".operation", { hasText: new RegExp(`^${name}$`) }) })
    .locator(".operation")
    .click();
