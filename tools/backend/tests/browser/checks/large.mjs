// Checks traces of many spans.

import assert from "node:assert/strict";
import { active, eventually } from "../ask.mjs";
import { now, trace } from "../spans.mjs";

/** Returns a root with chains of ten spans below it. Some spans have attributes, events and errors. */
function large(count) {
  const spans = [{ service: "root", name: "root", kind: "SERVER", at: 0, took: count * 10 }];
  for (let i = 1; i < count; i++) {
    const depth = (i - 1) % 10;
    spans.push({
      service: `service-${i % 7}`,
      name: `operation ${i}`,
      kind: "CLIENT",
      parent: depth ? i - 1 : 0,
      at: i * 10 - depth * 9,
      took: 90 - depth * 8,
      attributes: {
        "http.request.method": "GET",
        "http.route": `/items/${i}`,
        "server.address": "10.0.0.1",
        index: i,
      },
      events: i % 50 ? [] : [{ name: "retry", at: i * 10, attributes: { attempt: 1 } }],
      error: i % 97 ? undefined : "failed",
    });
  }
  return trace(spans, { start: now() - 60e6 });
}

async function posted(post, count) {
  const made = large(count);
  for (let i = 0; i < made.resourceSpans.length; i += 1000) {
    await post({ resourceSpans: made.resourceSpans.slice(i, i + 1000) });
  }
  return made;
}

export default {
  // The time is reported but not checked, because a busy machine is not the page's fault.
  async ten_thousand_spans_are_there({ open, post }) {
    const { traceID } = await posted(post, 10_000);
    const took = [];
    for (let i = 0; i < 3; i++) {
      const page = await open(`/trace/${traceID}`);
      await page.waitForSelector(".row");
      // When the second callback runs, a frame with the rows has been drawn.
      took.push(
        await page.evaluate(
          () =>
            new Promise((done) =>
              requestAnimationFrame(() => requestAnimationFrame(() => done(Math.round(performance.now())))),
            ),
        ),
      );
      assert.equal(await page.getAttribute("#waterfall", "aria-rowcount"), "10001");
      await page.context().close();
    }
    return `${took.join(", ")} ms after the navigation`;
  },

  async ten_thousand_spans_scroll_smoothly_with_few_rows_in_the_document({ open, post }) {
    const { traceID } = await posted(post, 10_000);
    const page = await open(`/trace/${traceID}`);
    await page.waitForSelector(".row");
    // `threadTicks` measures the processor time of the page's main thread, which doesn't depend on other processes.
    const devtools = await page.context().newCDPSession(page);
    await devtools.send("Performance.enable", { timeDomain: "threadTicks" });
    const busy = async () => {
      const { metrics } = await devtools.send("Performance.getMetrics");
      return metrics.find(({ name }) => name === "TaskDuration").value * 1000;
    };
    const before = await busy();
    const { frames, most, blank } = await page.evaluate(async () => {
      const grid = document.getElementById("waterfall");
      const frames = [];
      let most = 0;
      let blank = 0;
      let before = await new Promise(requestAnimationFrame);
      for (let i = 0; i < 120; i++) {
        grid.scrollTop += 377;
        const time = await new Promise(requestAnimationFrame);
        frames.push(time - before);
        before = time;
        most = Math.max(most, grid.querySelectorAll(".row").length);
        const { left, top, height } = grid.getBoundingClientRect();
        if (!document.elementFromPoint(left + 100, top + height / 2)?.closest(".row")) blank += 1;
      }
      return { frames: frames.sort((a, b) => a - b), most, blank };
    });
    const work = ((await busy()) - before) / frames.length;
    const [median, slow] = [0.5, 0.95].map((part) => frames[Math.ceil(part * frames.length) - 1].toFixed(1));
    const remark = `${work.toFixed(1)} ms of work a frame; frames of ${median} ms, 95 % within ${slow} ms; ${most} rows`;
    assert.ok(most < 120, remark);
    assert.equal(blank, 0, "frames without rows");
    return remark;
  },

  async the_keyboard_and_roles_are_right_where_rows_come_and_go({ open, post }) {
    const { traceID } = await posted(post, 3000);
    const page = await open(`/trace/${traceID}`);
    await page.waitForSelector(".row");
    await page.focus("#waterfall");
    await page.keyboard.press("End");
    await eventually(() => active(page), "operation 2999");
    const inSight = () =>
      page.$eval("#waterfall", (grid) => {
        const row = document
          .getElementById(grid.getAttribute("aria-activedescendant"))
          .getBoundingClientRect();
        const all = grid.getBoundingClientRect();
        return row.top >= all.top && row.bottom <= all.bottom + 1;
      });
    assert.equal(await inSight(), true);
    const last = page.locator(".row.active");
    assert.deepEqual(
      await last.evaluate((row) =>
        ["aria-rowindex", "aria-level", "aria-posinset", "aria-setsize"].map((name) =>
          row.getAttribute(name),
        ),
      ),
      ["3001", "10", "1", "1"],
    );
    // After the active row has scrolled out of sight, the arrow keys still move from this row.
    await page.$eval("#waterfall", (grid) => (grid.scrollTop = 0));
    await page.waitForSelector("#row-0");
    assert.equal(await active(page), "operation 2999");
    assert.equal(await page.evaluate(() => document.activeElement.id), "waterfall");
    await page.keyboard.press("ArrowUp");
    assert.equal(await active(page), "operation 2998");
    assert.equal(await inSight(), true);
    await page.keyboard.press("PageUp");
    assert.match(await active(page), /^operation 29[67]\d$/);
  },

  async late_spans_do_not_move_what_is_in_sight({ open, post }) {
    const { traceID, ids } = await posted(post, 3000);
    const page = await open(`/trace/${traceID}`);
    await page.waitForSelector("[data-state=live]");
    await page.waitForSelector(".row");
    await page.$eval("#waterfall", (grid) => (grid.scrollTop = 40_010));
    const name = "operation 1550";
    const top = () =>
      page.locator(".row", { hasText: name }).evaluate((row) => row.getBoundingClientRect().top);
    const before = await top();
    const late = { service: "late", name: "late", at: -120e6, took: 5, parent: ids[0] };
    await post(trace([late], { traceID }));
    await eventually(() => page.getAttribute("#waterfall", "aria-rowcount"), "3002");
    assert.equal(await top(), before);
  },

  async ten_thousand_levels_are_shown({ open, post }) {
    const spans = Array.from({ length: 10_000 }, (_, i) => ({
      service: "deep",
      name: `level ${i + 1}`,
      at: i,
      took: 20_001 - 2 * i,
      parent: i ? i - 1 : undefined,
    }));
    const made = trace(spans, { start: now() - 70e6 });
    for (let i = 0; i < 10; i++)
      await post({ resourceSpans: made.resourceSpans.slice(i * 1000, (i + 1) * 1000) });
    const page = await open(`/trace/${made.traceID}`);
    await page.waitForSelector(".row");
    await page.focus("#waterfall");
    await page.keyboard.press("End");
    await eventually(() => active(page), "level 10000");
    assert.equal(await page.getAttribute(".row.active", "aria-level"), "10000");
    assert.ok((await page.locator(".row.active .operation").boundingBox()).width > 20);
  },
};
