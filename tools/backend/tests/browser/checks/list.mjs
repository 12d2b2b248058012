// Checks the list of recent traces.

import assert from "node:assert/strict";
import { eventually, listed } from "../ask.mjs";
import { proxy } from "../proxy.mjs";
import { id, login, now, trace } from "../spans.mjs";

export default {
  async an_empty_list_says_how_to_fill_it({ open }) {
    const page = await open("/");
    await page.waitForSelector("#no-traces:visible");
    const curl = await page.textContent("#curl");
    assert.equal(
      curl,
      `curl -i http://localhost:8888/usercenter/v1/user/login -H 'content-type: application/json' -d '{"mobile":"13800138000"}'`,
    );
  },

  async the_list_shows_root_duration_spans_services_errors_and_age_newest_first({ open, post }) {
    const older = login({ start: now() - 90e6 });
    const newer = trace(
      [
        { service: "shop", name: "GET /cart", kind: "SERVER", at: 0, took: 25_000, error: "boom" },
        { service: "stock", name: "count", kind: "SERVER", at: 1000, took: 2000, parent: 0, error: "no" },
      ],
      { start: now() - 3e6 },
    );
    await post(older, newer);
    const page = await open("/");
    await eventually(() => listed(page), [newer.traceID, older.traceID]);
    const cells = await page.$$eval("#rows tr", (rows) =>
      rows.map((row) => [...row.cells].map((cell) => cell.textContent)),
    );
    assert.match(cells[0][6], /^\d+ s ago$/);
    assert.deepEqual(cells[0].slice(0, 6), [
      `shop GET /cart${newer.traceID.slice(0, 8)}`,
      "error",
      "shop 1stock 1",
      "2 spans",
      "2 errors",
      "25.0 ms",
    ]);
    assert.equal(cells[1][6], "1 min ago");
    assert.deepEqual([cells[1][1], ...cells[1].slice(3, 6)], ["200", "6 spans", "", "2.47 ms"]);
    assert.deepEqual(cells[1][2].split(/(?<=\d)/).sort(), ["api 4", "mq 1", "usercenter 1"]);
  },

  async a_new_trace_appears_by_itself({ open, post }) {
    const first = login();
    await post(first);
    const page = await open("/");
    await page.waitForSelector("[data-state=live]");
    // The page says that it is connected before it has read the list.
    await eventually(async () => (await listed(page))[0], first.traceID);
    const before = await listed(page);
    const added = login();
    await post(added);
    await eventually(() => listed(page), [added.traceID, ...before]);
  },

  async nothing_moves_under_the_cursor({ open, post }) {
    const first = login();
    await post(first);
    const page = await open("/");
    const row = page.locator("#rows tr").first();
    await row.hover();
    await eventually(async () => (await listed(page))[0], first.traceID);
    const before = await listed(page);
    const place = await row.boundingBox();
    const added = [login(), login({ start: now() + 1 })];
    await post(...added);
    await eventually(() => page.locator("#pending:visible").allTextContents(), ["Show 2 new"]);
    assert.deepEqual(await listed(page), before);
    assert.deepEqual(await row.boundingBox(), place);
    // An existing row is updated in place.
    await post(
      trace([{ service: "late", name: "late", at: 0, took: 10, parent: first.ids[0] }], {
        traceID: first.traceID,
      }),
    );
    await eventually(() => row.locator(".spans").textContent(), "7 spans");
    assert.deepEqual(await row.boundingBox(), place);
    await page.mouse.move(700, 20);
    await eventually(() => listed(page), [added[1].traceID, added[0].traceID, ...before]);
  },

  async nothing_moves_under_the_keyboards_focus({ open, post }) {
    await post(login());
    const page = await open("/");
    await page.waitForSelector("#rows a");
    const before = await listed(page);
    await page.keyboard.press("ArrowDown");
    const added = login();
    await post(added);
    await page.waitForSelector("#pending:visible");
    assert.deepEqual(await listed(page), before);
    await page.keyboard.press(".");
    await eventually(() => listed(page), [added.traceID, ...before]);
  },

  async the_search_finds_by_each_criterion_and_is_in_the_url({ open, post }) {
    const service = `search-${id(4)}`;
    const make = (name, took, attributes) =>
      trace([{ service, name, kind: "SERVER", at: 0, took, attributes }], { start: now() - 10e6 + took });
    const quick = make("quick", 200, { colour: "red", "with space": "a b" });
    const slow = make("slow", 3_000_000, { colour: "blue", ok: true });
    await post(quick, slow);
    const page = await open("/");
    await page.waitForSelector(`[name=service] option[value="${service}"]`, { state: "attached" });
    const search = async (fields, expected) => {
      for (const name of ["operation", "tags", "minDuration", "maxDuration", "traceID"]) {
        await page.fill(`[name=${name}]`, fields[name] ?? "");
      }
      await page.selectOption("[name=service]", fields.service ?? "");
      await page.click("#search [type=submit]");
      await eventually(
        () => listed(page),
        expected.map((trace) => trace.traceID),
      );
      const link = new URL(page.url());
      // Another person who follows the link sees the same list.
      const again = await open(link.pathname + link.search);
      await eventually(
        () => listed(again),
        expected.map((trace) => trace.traceID),
      );
      for (const [name, value] of Object.entries(fields))
        assert.equal(await again.inputValue(`[name=${name}]`), value);
      await again.context().close();
    };
    await search({ service }, [slow, quick]);
    await search({ service, operation: "quick" }, [quick]);
    await search({ service, tags: "colour=blue ok=true" }, [slow]);
    await search({ service, tags: "colour=green" }, []);
    await page.waitForSelector("#no-match:visible");
    await search({ service, minDuration: "1.5s" }, [slow]);
    await search({ service, maxDuration: "200us" }, [quick]);
    await search({ traceID: quick.traceID }, [quick]);
  },

  async the_search_has_a_time_range({ open, post }) {
    const service = `time-${id(4)}`;
    const make = (age) => trace([{ service, name: "a", at: 0, took: 5 }], { start: now() - age * 60e6 });
    const [fresh, old] = [make(1), make(120)];
    await post(fresh, old);
    const page = await open(`/?service=${service}`);
    await eventually(() => listed(page), [fresh.traceID, old.traceID]);
    await page.selectOption("[name=lookback]", "1h");
    await eventually(() => listed(page), [fresh.traceID]);
    assert.equal(new URL(page.url()).searchParams.get("lookback"), "1h");
    await page.selectOption("[name=lookback]", "custom");
    const local = (age) => {
      const time = new Date(Date.now() - age * 60e3);
      return new Date(time - time.getTimezoneOffset() * 60e3).toISOString().slice(0, 19);
    };
    await page.fill("[name=start]", local(180));
    await page.fill("[name=end]", local(60));
    await page.click("#search [type=submit]");
    await eventually(() => listed(page), [old.traceID]);
    const link = new URL(page.url());
    const again = await open(link.pathname + link.search);
    await eventually(() => listed(again), [old.traceID]);
    assert.equal(await again.inputValue("[name=start]"), await page.inputValue("[name=start]"));
  },

  async the_list_is_sorted_and_shows_a_refusal_and_all_services({ open, post }) {
    const service = `sort-${id(4)}`;
    const make = (name, took, more, others = []) =>
      trace(
        [
          { service, name, kind: "SERVER", at: 0, took, ...more },
          ...others.map((service) => ({ service, name: "x", at: 0, took: 1, parent: 0 })),
        ],
        { start: now() - 10e6 + took },
      );
    const code = (code) => ({ attributes: { "http.response.status_code": code } });
    const names = Array.from({ length: 12 }, (_, i) => `part-${i}`);
    const failed = make("failed", 10, { ...code(503), error: "" });
    const long = make("long", 5000, code(200), names);
    const lost = make("lost", 9000, code(404));
    const order = (...traces) => traces.map((trace) => trace.traceID);
    await post(failed, long, lost);
    const page = await open(`/?service=${service}`);
    await eventually(() => listed(page), order(lost, long, failed));
    await page.selectOption("[name=sort]", "errors");
    await eventually(() => listed(page), order(failed, lost, long));
    await page.selectOption("[name=sort]", "longest");
    await eventually(() => listed(page), order(lost, long, failed));
    const statuses = await page.$$eval("td.status", (cells) =>
      cells.map((cell) => [cell.textContent, cell.classList.contains("refused")]),
    );
    assert.deepEqual(statuses, [
      ["404", true],
      ["200", false],
      ["503", true],
    ]);
    assert.equal(await page.locator("td.spans").first().textContent(), "1 span");
    const chips = page.locator("tr", { hasText: "long" }).locator(".chip");
    assert.equal(await chips.count(), 13);
    for (const chip of await chips.all()) {
      const [inner, cell] = await chip.evaluate((chip) =>
        [chip, chip.parentElement].map((node) => node.getBoundingClientRect().bottom),
      );
      assert.ok(inner <= cell, `${inner} in ${cell}`);
    }
  },

  async a_long_list_has_pages_and_tells_of_new_traces_while_one_scrolls({ open, post }) {
    const service = `pages-${id(4)}`;
    const make = (i) => trace([{ service, name: `${i}`, at: 0, took: 5 }], { start: now() - 60e6 + i * 1000 });
    const traces = Array.from({ length: 120 }, (_, i) => make(i));
    await post(...traces);
    const ids = traces.map((trace) => trace.traceID).reverse();
    const page = await open(`/?service=${service}`);
    await eventually(() => listed(page), ids.slice(0, 100));
    await eventually(() => page.textContent("#count"), "1–100 of 120 traces");
    await page.mouse.move(700, 5);
    await page.mouse.wheel(0, 1500);
    await page.waitForFunction(() => scrollY > 1000);
    await page.waitForSelector("[data-state=live]");
    const added = make(200);
    await post(added);
    await page.waitForSelector("#pending:visible");
    assert.deepEqual(await listed(page), ids.slice(0, 100));
    const place = await page.locator("#pending").boundingBox();
    assert.ok(place.y >= 0 && place.y < 100, JSON.stringify(place));
    await page.click("#pending");
    await eventually(() => listed(page), [added.traceID, ...ids.slice(0, 99)]);
    await page.click("#next");
    await eventually(() => listed(page), ids.slice(99));
    await eventually(() => page.textContent("#count"), "101–121 of 121 traces");
    assert.equal(await page.isVisible("#next"), false);
    // A later page stays as it is.
    const newest = make(300);
    await post(newest);
    await eventually(() => page.locator("#pending:visible").allTextContents(), ["Show 1 new"]);
    assert.deepEqual(await listed(page), ids.slice(99));
    await page.goBack();
    await eventually(async () => (await listed(page))[0], newest.traceID);
    await page.keyboard.press("]");
    await eventually(() => listed(page), ids.slice(98));
    await page.click("#previous");
    await eventually(async () => (await listed(page))[0], newest.traceID);
  },

  async the_browsers_back_leads_to_the_search_before({ open, post }) {
    const service = `back-${id(4)}`;
    const wanted = trace([{ service, name: "a", at: 0, took: 5 }]);
    await post(wanted);
    const page = await open(`/?service=${service}`);
    await eventually(() => listed(page), [wanted.traceID]);
    await page.fill("[name=tags]", "colour=red");
    await page.keyboard.press("Enter");
    await eventually(() => listed(page), []);
    await page.goBack();
    await eventually(() => listed(page), [wanted.traceID]);
    assert.equal(await page.inputValue("[name=tags]"), "");
  },

  async jaegers_search_path_leads_to_the_list({ open, post }) {
    const service = `jaeger-${id(4)}`;
    const wanted = trace([{ service, name: "a", at: 0, took: 5, attributes: { colour: "red" } }]);
    await post(wanted, login());
    const page = await open(
      `/search?service=${service}&tags=${encodeURIComponent('{"colour":"red"}')}&lookback=1h`,
    );
    await eventually(() => listed(page), [wanted.traceID]);
  },

  async a_refused_search_says_why({ open }) {
    const page = await open("/?minDuration=soon", { allow: /400/ });
    await eventually(async () => /minDuration/.test(await page.textContent("#count")), true);
  },

  async a_backend_that_comes_back_is_found_again({ open, post, base }) {
    const door = await proxy(base);
    try {
      const page = await open("/", { base: door.address, allow: /ERR_/ });
      await page.waitForSelector("[data-state=live]");
      assert.equal(await page.isVisible("#gone"), false);
      await door.close();
      await page.waitForSelector("#gone:visible");
      await page.waitForSelector("[data-state=reconnecting]");
      const meanwhile = login();
      await post(meanwhile);
      await door.open();
      await page.waitForSelector("[data-state=live]");
      await eventually(async () => (await listed(page))[0], meanwhile.traceID);
      assert.equal(await page.isVisible("#gone"), false);
    } finally {
      await door.close();
    }
  },
};
