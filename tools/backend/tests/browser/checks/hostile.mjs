// Checks that no span can harm or break the page.

import assert from "node:assert/strict";
import { eventually, openDetails, rows } from "../ask.mjs";
import { id, now, trace } from "../spans.mjs";

const ATTACK = `"><script>window.ran=1</script><img src=x onerror="window.ran=1"><a href="javascript:window.ran=1">x</a>`;

/** Asserts that no script ran, and that no text of a span became an element. */
async function assertHarmless(page) {
  assert.equal(await page.evaluate(() => window.ran), undefined);
  assert.equal(await page.locator("img, iframe, object, script:not([src^='/page/'])").count(), 0);
  const hrefs = await page.$$eval("a", (links) => links.map((link) => link.getAttribute("href")));
  for (const href of hrefs) assert.match(href, /^\/($|trace\/[0-9a-f]+(#[0-9a-f]+)?$)/);
}

/** Answers the API in place of the backend. */
const answer = (path, body) => (page) => page.route(path, (route) => route.fulfill({ json: body }));

export default {
  async pages_have_a_policy_that_allows_no_markup_from_text({ open, base }) {
    for (const path of ["/", "/search", `/trace/${id(16)}`, "/page/dom.js"]) {
      const { headers } = await fetch(base + path);
      const policy = headers.get("content-security-policy") ?? "";
      assert.match(policy, /default-src 'self'/, path);
      assert.match(policy, /require-trusted-types-for 'script'/, path);
      assert.doesNotMatch(policy, /unsafe/, path);
      assert.equal(headers.get("x-content-type-options"), "nosniff", path);
    }
    const page = await open("/", { allow: /TrustedHTML/ });
    const thrown = await page.evaluate(() => {
      try {
        document.body.innerHTML = "<p>x";
        return "";
      } catch (error) {
        return error.name;
      }
    });
    assert.equal(thrown, "TypeError");
  },

  async markup_in_any_field_is_shown_as_the_text_it_is({ open, post, postLogs }) {
    const posted = trace(
      [
        { service: ATTACK, name: ATTACK, kind: "SERVER", at: 0, took: 100 },
        {
          service: "victim",
          name: ATTACK,
          kind: "CLIENT",
          at: 10,
          took: 50,
          parent: 0,
          error: ATTACK,
          attributes: { [ATTACK]: ATTACK, "http.url": "javascript:window.ran=1" },
          events: [{ name: ATTACK, at: 20, attributes: { [ATTACK]: ATTACK } }],
          resource: { [ATTACK]: ATTACK },
        },
      ],
      { start: now() + 1e6 },
    );
    await post(posted);
    const attributes = { [ATTACK]: ATTACK };
    await postLogs(posted, { spanID: posted.ids[1], at: 30, severity: ATTACK, body: ATTACK, attributes });
    const list = await open("/");
    await list.waitForSelector(`#rows a[href="/trace/${posted.traceID}"]`);
    assert.equal(await list.textContent("#rows tr .service"), ATTACK);
    assert.equal(await list.textContent("#rows tr .operation"), ATTACK);
    assert.ok((await list.textContent("#rows tr .services")).includes("<script>"));
    await list.selectOption("[name=service]", ATTACK);
    await list.focus("[name=operation]");
    await eventually(
      () => list.$$eval("#operations option", (options) => options.map((option) => option.value)),
      [ATTACK],
    );
    await assertHarmless(list);

    const page = await open(`/trace/${posted.traceID}`);
    await page.waitForSelector(".graph svg");
    assert.ok((await page.textContent(".box title")).startsWith(ATTACK));
    await page.keyboard.press("e");
    await page.waitForSelector("#side dl");
    const said = await page.$$eval(
      "#side th, #side td, #side b, #side .body, #side .failed, #side h2 .operation",
      (nodes) => nodes.map((node) => node.textContent),
    );
    // The attack is the key and the value of four attributes: the span's, the event's, the record's and the resource's.
    // It is also the event's name, the record's severity and body, the status message and the span's name.
    assert.equal(said.filter((text) => text === ATTACK).length, 13, JSON.stringify(said));
    assert.ok(said.includes(`error ${ATTACK}`));
    assert.equal(await page.title(), `${ATTACK.slice(0, 60)}… ${ATTACK.slice(0, 100)}… · Throughline`);
    await assertHarmless(page);
  },

  async links_that_are_not_ids_are_no_links({ open }) {
    const traceID = id(16);
    const bad = ["javascript:window.ran=1", "//example.com/", "../../api", ATTACK];
    const page = await open(`/trace/${traceID}`, {
      prepare: answer("**/api/traces/*", {
        data: [
          {
            traceID,
            spans: [
              {
                traceID,
                spanID: "1",
                operationName: "links",
                processID: "p1",
                startTime: 1,
                duration: 2,
                references: bad.map((text) => ({ refType: "FOLLOWS_FROM", traceID: text, spanID: text })),
              },
            ],
            processes: { p1: { serviceName: "a" } },
          },
        ],
      }),
    });
    await openDetails(page, "links");
    assert.deepEqual(
      await page.$$eval("#side ul li .id", (nodes) =>
        nodes.map((node) => [node.localName, node.textContent]),
      ),
      bad.map((text) => ["span", `${text} ${text}`]),
    );
    await assertHarmless(page);
  },

  async answers_with_anything_missing_or_of_another_type_are_shown_as_far_as_they_go({ open }) {
    const values = [
      undefined,
      null,
      7,
      -1,
      "text",
      true,
      [],
      {},
      [null],
      [{}],
      ["text"],
      { a: null },
      1e300,
      "__proto__",
    ];
    const traceID = id(16);
    let shown = 0;
    const page = await open("/", {});
    const whole = {
      traceID,
      spanID: "a1",
      operationName: "b",
      processID: "p1",
      startTime: 10,
      duration: 5,
      warnings: ["w"],
      references: [{ refType: "CHILD_OF", traceID, spanID: "a1" }],
      tags: [{ key: "k", type: "string", value: "v" }],
      logs: [{ timestamp: 11, fields: [{ key: "event", value: "e" }] }],
    };
    const answers = [];
    const record = { spanID: "a1", timestamp: 12, severity: "INFO", body: { value: "b" }, attributes: [] };
    const link = { traceID, spanID: "b2", service: "s", operation: "o", to: "a1" };
    const trace = { data: [{ traceID, spans: [whole] }] };
    for (const value of values) {
      for (const field of Object.keys(record))
        answers.push([trace, { data: [{ ...record, [field]: value }] }]);
      for (const field of Object.keys(link))
        answers.push([trace, {}, { data: [{ ...link, [field]: value }] }]);
      answers.push([trace, value, value], [trace, { data: value }, { data: value }]);
      answers.push([trace, { data: [value] }, { data: [value] }]);
      for (const field of Object.keys(whole))
        answers.push({ data: [{ traceID, processes: {}, spans: [{ ...whole, [field]: value }] }] });
      for (const field of ["key", "value"])
        answers.push({
          data: [{ traceID, spans: [{ ...whole, tags: [{ key: "k", value: "v", [field]: value }] }] }],
        });
      for (const field of ["refType", "traceID", "spanID"])
        answers.push({
          data: [
            { traceID, spans: [{ ...whole, references: [{ ...whole.references[0], [field]: value }] }] },
          ],
        });
      for (const field of ["timestamp", "fields"])
        answers.push({
          data: [{ traceID, spans: [{ ...whole, logs: [{ ...whole.logs[0], [field]: value }] }] }],
        });
      answers.push(
        { data: [{ traceID, processes: value, spans: [whole] }] },
        { data: [{ traceID, processes: { p1: value }, spans: [whole, value] }] },
      );
      answers.push({ data: [{ traceID: value, spans: [whole] }] });
    }
    // The page is not loaded again for each answer, because that would take minutes.
    shown = await page.evaluate(async (answers) => {
      const { readTrace } = await import("/page/jaeger.js");
      const { arrange } = await import("/page/tree.js");
      const { showDetails } = await import("/page/details.js");
      const { showOverview } = await import("/page/overview.js");
      const { row } = await import("/page/waterfall_row.js");
      const { timeline } = await import("/page/timeline.js");
      const side = document.createElement("aside");
      for (const answer of answers) {
        try {
          const trace = arrange(readTrace(...[answer].flat()));
          showOverview(side, trace);
          for (const span of trace.spans) {
            showDetails(side, trace, span, {});
            row().show(span, timeline(trace), false);
          }
        } catch (error) {
          throw new Error(`${JSON.stringify(answer)}: ${error.stack}`);
        }
      }
      return answers.length;
    }, answers);
    for (const value of values) {
      for (const body of [
        { data: value },
        { data: [value] },
        { data: [{ traceID, services: value, duration: value, rootService: value, startTime: value }] },
      ]) {
        await page.route("**/api/recent*", (route) => route.fulfill({ json: body }), { times: 1 });
        const list = page.waitForResponse("**/api/recent*");
        await page.goto(page.url());
        await list;
        await page.waitForSelector("#rows a, #no-traces:visible");
        shown += 1;
      }
    }
    return `${shown} answers`;
  },

  async parents_in_a_circle_and_ids_used_twice_are_all_shown({ open }) {
    const traceID = id(16);
    const span = (spanID, parent, operationName) => ({
      traceID,
      spanID,
      operationName,
      startTime: 1,
      duration: 2,
      references: parent ? [{ refType: "CHILD_OF", traceID, spanID: parent }] : [],
    });
    const page = await open(`/trace/${traceID}`, {
      prepare: answer("**/api/traces/*", {
        data: [
          {
            traceID,
            spans: [
              span("d", "b", "beside"),
              span("a", "c", "one"),
              span("b", "a", "two"),
              span("c", "b", "three"),
              span("e", "e", "self"),
              span("f", "", "twin"),
              span("f", "", "twin"),
            ],
          },
        ],
      }),
    });
    await page.waitForSelector(".row");
    const seen = await rows(page);
    assert.deepEqual(seen.map(({ name }) => name).sort(), [
      "beside",
      "one",
      "self",
      "three",
      "twin",
      "twin",
      "two",
    ]);
  },

  async a_path_that_is_no_trace_id_says_so({ open }) {
    const page = await open("/trace/%3Cscript%3E", { allow: /400|404/ });
    await page.waitForSelector("#missing:visible, #failure:visible");
    await assertHarmless(page);
  },
};
