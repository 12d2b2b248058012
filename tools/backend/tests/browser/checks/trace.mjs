// Checks the page of one trace.

import assert from "node:assert/strict";
import { active, beside, eventually, fact, openDetails, rows, tree } from "../ask.mjs";
import { id, login, now, trace } from "../spans.mjs";

const LOGIN = [
  "POST /usercenter/v1/user/login",
  "  usercenter.v1.Usercenter/GetUserByMobile",
  "    usercenter.v1.Usercenter/GetUserByMobile",
  "  local",
  "  send_msg_mq",
  "    mq_consumer_msg",
];

/** Returns a trace whose critical path can be found by hand. Times are in milliseconds. */
function known() {
  const span = (name, from, until, parent, more) => ({
    service: "known",
    name,
    kind: "INTERNAL",
    at: from * 1000,
    took: (until - from) * 1000,
    parent,
    ...more,
  });
  return trace([
    span("root", 0, 1000, undefined, { kind: "SERVER" }),
    span("first", 100, 400, 0),
    span("inner", 150, 300, 1),
    span("beside the first", 200, 350, 0),
    span("second", 450, 900, 0),
    span("send", 700, 800, 4, { kind: "PRODUCER" }),
    span("consume", 750, 1250, 5, { kind: "CONSUMER", service: "consumer" }),
  ]);
}

/** Returns the left and right edges of elements in a span's row, as shares of the timeline. */
function geometry(page, name, selector) {
  return page.$$eval(
    "#rows .row",
    (nodes, [name, selector]) => {
      const node = nodes.find((node) => node.querySelector(".operation").textContent === name);
      const whole = node.querySelector(".time").getBoundingClientRect();
      return [...node.querySelectorAll(selector)].map((mark) => {
        const { left, width } = mark.getBoundingClientRect();
        return [(left - whole.left) / whole.width, (left + width - whole.left) / whole.width];
      });
    },
    [name, selector],
  );
}

function assertClose(actual, expected) {
  assert.equal(actual.length, expected.length, `${JSON.stringify(actual)} for ${JSON.stringify(expected)}`);
  actual.flat().forEach((value, index) => {
    assert.ok(
      Math.abs(value - expected.flat()[index]) < 0.004,
      `${JSON.stringify(actual)} for ${JSON.stringify(expected)}`,
    );
  });
}

export default {
  async a_login_is_a_tree_of_six_spans_with_services_and_kinds({ open, post }) {
    const posted = login();
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await eventually(() => tree(page), LOGIN);
    const seen = await rows(page);
    assert.deepEqual(
      seen.map((row) => row.service),
      ["api", "api", "usercenter", "api", "api", "mq"],
    );
    assert.deepEqual(
      seen.map((row) => row.kind),
      ["SERVER", "CLIENT", "SERVER", "INTERNAL", "PRODUCER", "CONSUMER"],
    );
    assert.deepEqual(
      seen.map((row) => row.place),
      ["1/1", "1/3", "1/1", "2/3", "3/3", "1/1"],
    );
    assert.deepEqual(
      seen.map((row) => row.expanded),
      ["true", "true", null, null, "true", null],
    );
    assert.equal(await page.getAttribute("#waterfall", "aria-rowcount"), "7");
    assert.deepEqual(
      await page.$$eval("#facts dd", (facts) =>
        facts.map((fact) => fact.firstChild.textContent).filter((_, i) => i !== 1),
      ),
      [posted.traceID, "2.47 ms", "6 spans", "3 services", "0 errors"],
    );
    const colours = await page.$$eval(".row .service", (names) =>
      names.map((name) => getComputedStyle(name).borderLeftColor),
    );
    assert.equal(new Set(colours).size, 3);
  },

  async bars_lie_where_their_times_say({ open, post }) {
    const posted = known();
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await page.waitForSelector(".row");
    assertClose(await geometry(page, "root", ".bar-of-span"), [[0, 0.8]]);
    assertClose(await geometry(page, "inner", ".bar-of-span"), [[0.12, 0.24]]);
    assertClose(await geometry(page, "consume", ".bar-of-span"), [[0.6, 1]]);
    assert.deepEqual(await page.$$eval("#scale span", (marks) => marks.map((mark) => mark.textContent)), [
      "0",
      "313 ms",
      "625 ms",
      "938 ms",
      "1.25 s",
    ]);
  },

  async the_critical_path_and_self_times_are_those_told_by_hand({ open, post }) {
    const posted = known();
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await page.waitForSelector(".row");
    assertClose(await geometry(page, "root", ".critical"), [
      [0, 0.08],
      [0.32, 0.36],
      [0.72, 0.8],
    ]);
    assertClose(await geometry(page, "first", ".critical"), [
      [0.08, 0.12],
      [0.24, 0.32],
    ]);
    assertClose(await geometry(page, "inner", ".critical"), [[0.12, 0.24]]);
    assertClose(await geometry(page, "beside the first", ".critical"), []);
    assertClose(await geometry(page, "second", ".critical"), [
      [0.36, 0.56],
      [0.64, 0.72],
    ]);
    assertClose(await geometry(page, "consume", ".critical"), []);
    const times = {
      root: ["250 ms 25 % of it", "250 ms without its children"],
      first: ["150 ms 15 % of it", "150 ms without its children"],
      "beside the first": ["not on it", "150 ms without its children"],
      second: ["350 ms 35 % of it", "350 ms without its children"],
      send: ["100 ms 10 % of it", "100 ms without its children"],
      consume: ["not on it", "500 ms without its children"],
    };
    for (const [name, [critical, self]] of Object.entries(times)) {
      await openDetails(page, name);
      assert.equal(await fact(page, "Critical path"), critical, name);
      assert.equal(await fact(page, "Self time"), self, name);
    }
  },

  async a_click_collapses_and_expands({ open, post }) {
    const posted = login();
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await eventually(() => tree(page), LOGIN);
    await page.locator(".twist").nth(1).click();
    await eventually(() => tree(page), [...LOGIN.slice(0, 2), ...LOGIN.slice(3)]);
    const collapsed = (await rows(page))[1];
    assert.deepEqual([collapsed.expanded, collapsed.note], ["false", "+1"]);
    await page.locator(".twist").nth(1).click();
    await eventually(() => tree(page), LOGIN);
    await page.click("#collapse");
    await eventually(() => tree(page), LOGIN.slice(0, 1));
    await page.click("#expand");
    await eventually(() => tree(page), LOGIN);
  },

  async the_keyboard_walks_collapses_and_expands({ open, post }) {
    const posted = login();
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await eventually(() => tree(page), LOGIN);
    await page.focus("#waterfall");
    const press = async (key, name) => {
      await page.keyboard.press(key);
      assert.equal(await active(page), name.trim(), key);
    };
    await press("ArrowDown", LOGIN[1]);
    await press("ArrowLeft", LOGIN[1]);
    assert.deepEqual(await tree(page), [...LOGIN.slice(0, 2), ...LOGIN.slice(3)]);
    await press("ArrowDown", LOGIN[3]);
    await press("ArrowUp", LOGIN[1]);
    await press("ArrowRight", LOGIN[1]);
    assert.deepEqual(await tree(page), LOGIN);
    await press("ArrowRight", LOGIN[2]);
    await press("ArrowLeft", LOGIN[1]);
    await press("End", LOGIN[5]);
    await press("Home", LOGIN[0]);
    await press("ArrowUp", LOGIN[0]);
    await page.keyboard.press("Shift+ArrowLeft");
    assert.deepEqual(await tree(page), LOGIN.slice(0, 1));
    await page.keyboard.press("Shift+ArrowRight");
    assert.deepEqual(await tree(page), LOGIN);
  },

  async details_hold_attributes_resource_and_parent({ open, post }) {
    const posted = login();
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await openDetails(page, "mq_consumer_msg");
    assert.equal(await beside(page), "mq mq_consumer_msg");
    assert.equal(await fact(page, "Kind"), "CONSUMER");
    const titles = await page.$$eval("#side h3", (titles) => titles.map((title) => title.textContent));
    assert.deepEqual(titles, ["Attributes", "Resource"]);
    assert.match(await fact(page, "Start"), /^\+1\.63 ms \d{4}-/);
    assert.equal(await fact(page, "Duration"), "840 µs 34 % of the trace");
    assert.equal(await fact(page, "Span id"), `${posted.ids[5]}Copy idCopy link`);
    const cells = await page.$$eval("#side tr", (rows) =>
      rows.map((row) => `${row.cells[0].textContent}=${row.cells[1].textContent}`),
    );
    for (const expected of [
      "messaging.system=rabbitmq",
      "messaging.rabbitmq.message.delivery_tag=1",
      "service.version=0.1.0",
    ]) {
      assert.ok(cells.includes(expected), `${expected} in ${cells}`);
    }
    await page.click("#side dd button.link");
    await eventually(() => beside(page), "api send_msg_mq");
    assert.equal(await active(page), "send_msg_mq");
    await page.click("[aria-label='Close the details']");
    await eventually(() => beside(page), "Services");
  },

  async events_are_in_the_details_and_on_the_bar({ open, post }) {
    const posted = trace([
      { service: "a", name: "root", at: 0, took: 2000 },
      {
        service: "a",
        name: "retries",
        at: 0,
        took: 1000,
        parent: 0,
        events: [
          { name: "retry", at: 500, attributes: { attempt: 2, "retry.reason": "UNAVAILABLE" } },
          { name: "retry", at: 250, attributes: { attempt: 1 } },
        ],
      },
    ]);
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await openDetails(page, "retries");
    assert.deepEqual(
      await page.$$eval("#side .events li", (events) => events.map((event) => event.textContent)),
      ["+250 µs retryattempt1", "+500 µs retryattempt2retry.reasonUNAVAILABLE"],
    );
    const marks = await geometry(page, "retries", ".event");
    assertClose(
      marks.map(([left, right]) => [(left + right) / 2]),
      [[0.125], [0.25]],
    );
  },

  async the_logs_of_a_span_are_in_its_details_also_when_they_come_late({ open, post, postLogs }) {
    const posted = trace([
      { service: "a", name: "root", at: 0, took: 2000 },
      { service: "a", name: "buy", at: 0, took: 1000, parent: 0 },
    ]);
    const [root, buy] = posted.ids;
    await postLogs(posted, { spanID: root, at: 1, severity: "INFO", body: "of another span" });
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await page.waitForSelector("[data-state=live]");
    await openDetails(page, "buy");
    await eventually(() => beside(page), "a buy");
    assert.equal(await page.locator("#side .logs").count(), 0);
    await postLogs(
      posted,
      { spanID: buy, at: 500, severity: "ERROR", body: "no stock", attributes: { left: 0, "item.id": "b7" } },
      { spanID: buy, at: 250, severity: "INFO", body: "looking" },
      { spanID: id(8), at: 0, severity: "INFO", body: "of no span here" },
    );
    await eventually(
      () => page.$$eval("#side .logs li", (records) => records.map((record) => record.textContent)),
      ["+250 µs INFO looking", "+500 µs ERROR no stockleft0item.idb7"],
    );
    assert.equal(await page.textContent("#side .logs .failed"), "ERROR");
    assert.ok((await page.textContent("#side")).includes("2 log records"));
    assert.equal(await page.locator("#side .events").count(), 0);
    await page.fill("#find-text", "no stock");
    await eventually(() => page.textContent("#found"), "1 found");
  },

  async errors_are_marked_and_the_key_e_leads_from_one_to_the_next({ open, post }) {
    const posted = trace([
      { service: "a", name: "fine", at: 0, took: 100 },
      { service: "a", name: "bad", at: 1, took: 50, parent: 0, error: "it broke" },
      { service: "a", name: "worse", at: 60, took: 30, parent: 0, error: "" },
    ]);
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await page.waitForSelector(".row");
    assert.deepEqual(
      (await rows(page)).map((row) => row.outcome),
      ["", "it broke", "error"],
    );
    assert.equal(await page.textContent("#facts .failed"), "2 errors");
    const outlines = await page.$$eval(".bar-of-span", (bars) =>
      bars.map((bar) => getComputedStyle(bar).outlineStyle),
    );
    assert.deepEqual(outlines, ["none", "solid", "solid"]);
    await page.keyboard.press("e");
    await eventually(() => beside(page), "a bad");
    assert.equal(await fact(page, "Status"), "error it broke");
    await page.keyboard.press("e");
    await eventually(() => beside(page), "a worse");
    await page.keyboard.press("e");
    await eventually(() => beside(page), "a bad");
  },

  async the_service_graph_counts_the_calls_of_the_trace({ open, post }) {
    const call = (at) => ({
      service: "back",
      name: `call ${at}`,
      kind: "SERVER",
      at,
      took: 5,
      parent: 0,
      error: at > 20 ? "no" : undefined,
    });
    const posted = trace([
      { service: "front", name: "root", kind: "SERVER", at: 0, took: 100 },
      call(10),
      call(20),
      call(30),
      { service: "queue worker", name: "work", kind: "CONSUMER", at: 40, took: 5, parent: 1 },
    ]);
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await page.waitForSelector(".graph svg");
    const boxes = await page.$$eval(".box", (boxes) =>
      boxes.map((box) => [...box.querySelectorAll("text")].map((text) => text.textContent).join(": ")),
    );
    assert.deepEqual(boxes, ["front: 1 span", "back: 3 spans  1 error", "queue worker: 1 span"]);
    const edges = await page.$$eval(".edge", (edges) =>
      edges.map((edge) => [edge.textContent, edge.getAttribute("class")]),
    );
    assert.deepEqual(edges, [
      ["3×", "edge failed"],
      ["1×", "edge message"],
    ]);
    assert.equal(
      await page.getAttribute(".graph svg", "aria-label"),
      "front calls back 3 times, back calls queue worker 1 time",
    );
    const lefts = await page.$$eval(".box", (boxes) => boxes.map((box) => box.getBoundingClientRect().left));
    assert.ok(lefts[0] < lefts[1] && lefts[1] < lefts[2], `${lefts}`);
  },

  async a_link_leads_to_the_span_of_the_other_trace({ open, post }) {
    const linked = login();
    const posted = trace([
      {
        service: "batch",
        name: "collect",
        at: 0,
        took: 9,
        links: [{ traceID: linked.traceID, spanID: linked.ids[4] }],
      },
    ]);
    await post(linked, posted);
    const page = await open(`/trace/${posted.traceID}`);
    assert.equal(
      (
        await rows(page)
          .then(() => page.waitForSelector(".row"))
          .then(() => rows(page))
      )[0].note,
      "1 link",
    );
    await openDetails(page, "collect");
    await page.click("#side ul a");
    await page.waitForURL(`**/trace/${linked.traceID}#${linked.ids[4]}`);
    await eventually(() => beside(page), "api send_msg_mq");
    // The link also leads back, and so does a link that comes late.
    assert.equal((await rows(page))[4].note, "1 link");
    await page.click("#side ul a");
    await page.waitForURL(`**/trace/${posted.traceID}#${posted.ids[0]}`);
    await page.waitForSelector("[data-state=live]");
    const late = { service: "late", name: "b", at: 0, took: 9 };
    await post(trace([{ ...late, links: [{ traceID: posted.traceID, spanID: posted.ids[0] }] }]));
    await eventually(async () => (await rows(page))[0].note, "2 links");
    await page.keyboard.press("Escape");
    await eventually(() => page.locator("#side ul .quiet").allTextContents(), ["late b"]);
  },

  async a_row_shows_the_status_and_the_reason_of_a_failure({ open, post }) {
    const status = (code) => ({ "http.response.status_code": code });
    const grpc = { "rpc.response.status_code": "UNAVAILABLE", "error.type": "UNAVAILABLE" };
    const spans = [
      { service: "a", name: "lost", kind: "SERVER", at: 0, took: 99, attributes: status(404) },
      { service: "a", name: "fine", kind: "CLIENT", at: 1, took: 9, parent: 0, attributes: status(200) },
      { service: "a", name: "down", kind: "CLIENT", at: 2, took: 9, parent: 0, attributes: grpc, error: "" },
      {
        service: "a",
        name: "late",
        at: 3,
        took: 9,
        parent: 0,
        attributes: { ...status(503), "error.type": "timeout" },
        error: "",
      },
    ];
    const posted = trace(spans);
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await page.waitForSelector(".row");
    const shown = await page.$$eval(".outcome", (nodes) =>
      nodes.map((node) => [node.textContent, node.classList.contains("failed")]),
    );
    assert.deepEqual(shown, [
      ["404", true],
      ["200", false],
      ["UNAVAILABLE", true],
      ["503 timeout", true],
    ]);
    await openDetails(page, "lost");
    assert.equal(await fact(page, "Status"), "404");
  },

  async a_service_has_the_same_colour_everywhere({ open, post }) {
    const names = ["one", "two", "three", "four", "five", "six"];
    const make = (names) => trace(names.map((service, i) => ({ service, name: "x", at: i, took: 5 })));
    const [there, back] = [make(names), make([...names].reverse())];
    await post(there, back);
    const seen = new Set();
    for (const path of [`/trace/${there.traceID}`, `/trace/${back.traceID}`, "/?service=six"]) {
      const page = await open(path);
      await page.waitForSelector(".row, #rows tr");
      const colours = await page.evaluate(() =>
        [...document.querySelectorAll(".row, .chip")].map((node) => {
          const name = node.querySelector(".service")?.textContent ?? node.firstChild.data;
          return `${name} ${node.style.getPropertyValue("--hue")}`;
        }),
      );
      colours.forEach((colour) => seen.add(colour));
    }
    assert.equal(seen.size, names.length, [...seen].join(", "));
  },

  async a_pause_of_ten_minutes_takes_little_of_the_axis({ open, post }) {
    const later = 600e6;
    const posted = trace([
      { service: "a", name: "send", kind: "PRODUCER", at: 0, took: 1000 },
      { service: "b", name: "work", kind: "CONSUMER", at: later, took: 3000, parent: 0 },
    ]);
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await page.waitForSelector(".row");
    // The pause takes 5 % of the axis, and the work divides the rest.
    assertClose(await geometry(page, "send", ".bar-of-span"), [[0, 0.2375]]);
    assertClose(await geometry(page, "work", ".bar-of-span"), [[0.2875, 1]]);
    assert.equal(await page.textContent("#scale .pause"), "10 min 0 s");
    assert.equal(await page.locator("#pauses .pause").count(), 1);
    assert.equal(await page.textContent("#scale span:last-of-type"), "+3.00 ms");
  },

  async the_axis_is_zoomed_by_drag_and_by_keys({ open, post }) {
    const posted = known();
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await page.waitForSelector(".row");
    const scale = () => page.$$eval("#scale span", (marks) => marks.map((mark) => mark.textContent));
    const whole = await scale();
    const column = await page.locator("#time").boundingBox();
    const drag = async (from, to) => {
      await page.mouse.move(column.x + column.width * from, column.y + 40);
      await page.mouse.down();
      await page.mouse.move(column.x + column.width * to, column.y + 60, { steps: 3 });
      assert.equal(await page.isVisible("#selection"), true);
      await page.mouse.up();
    };
    // From 250 to 750 of 1250 ms, backwards.
    await drag(0.6, 0.2);
    await eventually(scale, ["250 ms", "375 ms", "500 ms", "625 ms", "750 ms"]);
    assertClose(await geometry(page, "second", ".bar-of-span"), [[0.4, 1]]);
    // A part of this span's time is out of sight.
    assertClose(await geometry(page, "first", ".bar-of-span"), [[0, 0.3]]);
    // The drag does not open any details.
    assert.equal(await beside(page), "Services");
    await page.click("#whole");
    await eventually(scale, whole);
    await page.focus("#waterfall");
    await page.keyboard.press("End");
    await page.keyboard.press("ArrowUp");
    await page.keyboard.press("z");
    await eventually(scale, ["700 ms", "725 ms", "750 ms", "775 ms", "800 ms"]);
    await page.keyboard.press("]");
    await eventually(scale, ["750 ms", "775 ms", "800 ms", "825 ms", "850 ms"]);
    assert.equal(await page.locator(".row", { hasText: "inner" }).locator(".took").textContent(), "◂ 150 ms");
    await page.keyboard.press("[");
    await page.keyboard.press("-");
    await eventually(scale, ["650 ms", "700 ms", "750 ms", "800 ms", "850 ms"]);
    await page.keyboard.press("+");
    await eventually(scale, ["700 ms", "725 ms", "750 ms", "775 ms", "800 ms"]);
    await page.keyboard.press("Escape");
    await eventually(scale, whole);
  },

  async a_stack_trace_keeps_its_lines_and_ids_can_be_copied({ open, post }) {
    const line = "   at com.example.a.rather.long.package.Handler.handle(Handler.java:42)";
    const stack = ["java.lang.IllegalStateException: no", ...Array.from({ length: 9 }, () => line)].join("\n");
    const posted = trace([
      {
        service: "a",
        name: "broken",
        at: 0,
        took: 99,
        error: "no",
        events: [{ name: "exception", at: 9, attributes: { "exception.stacktrace": stack } }],
      },
    ]);
    await post(posted);
    const permissions = ["clipboard-read", "clipboard-write"];
    const page = await open(`/trace/${posted.traceID}`, { permissions });
    await page.waitForSelector(".row");
    await openDetails(page, "broken");
    const [cell, side] = await page.$eval("#side .lines td", (cell) => [
      { height: cell.clientHeight, line: Number.parseFloat(getComputedStyle(cell).lineHeight), width: cell.clientWidth },
      cell.closest("aside").clientWidth,
    ]);
    assert.equal(Math.floor(cell.height / cell.line), 10, JSON.stringify(cell));
    assert.ok(cell.width > side * 0.8, `${cell.width} of ${side}`);
    const link = new URL(`/trace/${posted.traceID}`, page.url()).href;
    for (const [place, button, text] of [
      ["#facts", "Copy id", posted.traceID],
      ["#facts", "Copy link", link],
      ["#side", "Copy id", posted.ids[0]],
      ["#side", "Copy link", `${link}#${posted.ids[0]}`],
    ]) {
      await page.locator(place).getByText(button).click();
      await eventually(() => page.evaluate(() => navigator.clipboard.readText()), text);
    }
  },

  async a_url_leads_to_a_span_and_to_what_was_found({ open, post }) {
    const posted = login();
    await post(posted);
    const page = await open(`/trace/${posted.traceID}#${posted.ids[3]}`);
    await eventually(() => beside(page), "api local");
    assert.equal(await page.textContent(".row[aria-selected=true] .operation"), "local");
    await openDetails(page, "send_msg_mq");
    await eventually(async () => new URL(page.url()).hash, `#${posted.ids[4]}`);
    const found = await open(`/trace/${posted.traceID.toUpperCase()}?uiFind=rabbitmq`);
    await eventually(() => found.textContent("#found"), "2 found");
    assert.deepEqual(
      await found.$$eval(".row.found .operation", (names) => names.map((name) => name.textContent)),
      ["send_msg_mq", "mq_consumer_msg"],
    );
    await found.keyboard.press("/");
    await found.keyboard.press("Enter");
    await eventually(() => beside(found), "api send_msg_mq");
    await found.keyboard.press("Shift+Enter");
    await eventually(() => beside(found), "mq mq_consumer_msg");
    assert.equal(await found.textContent("#found"), "2 of 2");
  },

  async late_spans_appear_where_they_belong_and_nothing_else_changes({ open, post }) {
    const posted = login();
    await post(posted);
    const page = await open(`/trace/${posted.traceID}#${posted.ids[5]}`);
    await page.waitForSelector("[data-state=live]");
    await eventually(() => tree(page), LOGIN);
    await page.locator(".twist").nth(1).click();
    await openDetails(page, "mq_consumer_msg");
    await eventually(() => beside(page), "Services");
    await openDetails(page, "mq_consumer_msg");
    await post(
      trace(
        [{ service: "users", name: "SELECT", kind: "CLIENT", at: 910, took: 20, parent: posted.ids[3] }],
        { traceID: posted.traceID, start: now() },
      ),
    );
    await eventually(() => tree(page), [...LOGIN.slice(0, 2), "  local", "    SELECT", ...LOGIN.slice(4)]);
    assert.equal(await beside(page), "mq mq_consumer_msg");
    assert.equal(await page.textContent(".row[aria-selected=true] .operation"), "mq_consumer_msg");
  },

  async a_trace_that_is_not_there_yet_appears_when_it_comes({ open, post }) {
    const traceID = id(16);
    const page = await open(`/trace/${traceID}`, { allow: /404/ });
    await page.waitForSelector("#missing:visible");
    assert.equal(await page.textContent("#missing-id"), traceID);
    await page.waitForSelector("[data-state=live]");
    await post(login({ traceID }));
    await eventually(() => tree(page), LOGIN);
    assert.equal(await page.isVisible("#missing"), false);
  },

  async a_span_without_its_parent_is_a_root_and_says_so({ open, post }) {
    const posted = trace([{ service: "a", name: "lost", at: 0, took: 5, parent: id(8) }]);
    await post(posted);
    const page = await open(`/trace/${posted.traceID}`);
    await page.waitForSelector(".row");
    const [row] = await rows(page);
    assert.deepEqual([row.level, row.note], [1, "parent missing"]);
  },
};
