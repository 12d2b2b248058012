// Checks that everybody can use the page: by keyboard, on narrow screens, light and dark, without motion.

import assert from "node:assert/strict";
import { active, beside, eventually, tree } from "../ask.mjs";
import { login, trace } from "../spans.mjs";

/** Returns the least contrast (WCAG 2) between a visible text and its background, and that text. */
function leastContrast(page) {
  return page.evaluate(() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => {
      const [x, y, z] = [r, g, b].map((c) =>
        c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4,
      );
      return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = (node) => {
      for (let at = node; at; at = at.parentElement) {
        const colour = rgba(getComputedStyle(at).backgroundColor);
        if (colour[3] === 255) return colour;
      }
      return [255, 255, 255, 255];
    };
    let least = { contrast: 21, text: "" };
    for (const node of document.querySelectorAll("body *")) {
      const text = [...node.childNodes]
        .filter((child) => child.nodeType === Node.TEXT_NODE)
        .map((child) => child.data.trim())
        .join("");
      const style = getComputedStyle(node);
      if (!text || !node.checkVisibility() || Number.parseFloat(style.fontSize) === 0) continue;
      const svg = node instanceof SVGElement;
      if (svg && node.localName === "title") continue;
      const levels = [luminance(rgba(svg ? style.fill : style.color)), luminance(behind(node))].sort(
        (a, b) => b - a,
      );
      const contrast = (levels[0] + 0.05) / (levels[1] + 0.05);
      if (contrast < least.contrast) least = { contrast, text };
    }
    return least;
  });
}

function failing() {
  return trace([
    {
      service: "api",
      name: "GET /a/rather/long/route/with/many/parts/{id}",
      kind: "SERVER",
      at: 0,
      took: 9000,
      error: "no",
    },
    {
      service: "a-service-with-quite-a-long-name",
      name: "com.example.long.package.Service/Method",
      kind: "CLIENT",
      at: 10,
      took: 8000,
      parent: 0,
      error: "no",
      attributes: { "a.very.long.attribute.key.that.goes.on.and.on": "x".repeat(300) },
      events: [{ name: "exception", at: 20, attributes: { "exception.stacktrace": "at a\n  at b" } }],
    },
  ]);
}

export default {
  async the_keyboard_alone_leads_through_all_of_it({ open, post }) {
    const posted = login();
    await post(posted);
    const page = await open("/");
    await page.waitForSelector("#rows a");
    await page.keyboard.press("/");
    assert.equal(await page.evaluate(() => document.activeElement.name), "service");
    await page.keyboard.press("Escape");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowUp");
    assert.equal(
      await page.evaluate(() => document.activeElement.getAttribute("href")),
      `/trace/${posted.traceID}`,
    );
    const ring = await page.evaluate(() => getComputedStyle(document.activeElement, "::after").outlineStyle);
    assert.equal(ring, "solid");
    await page.keyboard.press("Enter");
    await page.waitForSelector(".row");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowDown");
    assert.equal(await active(page), "usercenter.v1.Usercenter/GetUserByMobile");
    assert.equal(await page.$eval(".row.active", (row) => getComputedStyle(row).outlineStyle), "solid");
    await page.keyboard.press("Enter");
    await eventually(() => beside(page), "api usercenter.v1.Usercenter/GetUserByMobile");
    // Open details follow the keyboard.
    await page.keyboard.press("ArrowDown");
    await eventually(() => beside(page), "usercenter usercenter.v1.Usercenter/GetUserByMobile");
    await page.keyboard.press("Escape");
    await eventually(() => beside(page), "Services");
    await page.keyboard.press("/");
    await page.keyboard.type("mq_consumer");
    await eventually(() => page.textContent("#found"), "1 found");
    assert.equal(new URL(page.url()).searchParams.get("uiFind"), "mq_consumer");
    await page.keyboard.press("Enter");
    await eventually(() => active(page), "mq_consumer_msg");
    await page.keyboard.press("Escape");
    assert.equal(await page.evaluate(() => document.activeElement.id), "waterfall");
    await page.keyboard.press("?");
    await page.waitForSelector("#help[open]");
    await page.keyboard.press("Escape");
    await page.waitForSelector("#help[open]", { state: "detached" });
    await page.keyboard.press("Escape");
    await eventually(() => beside(page), "Services");
    await page.keyboard.press("Escape");
    await page.waitForURL((url) => url.pathname === "/");
  },

  async tab_reaches_every_part_and_the_tree_is_one_stop({ open, post }) {
    const posted = login();
    await post(posted);
    const page = await open(`/trace/${posted.traceID}#${posted.ids[1]}`);
    await eventually(async () => (await tree(page)).length, 6);
    const stops = [];
    for (let i = 0; i < 12; i++) {
      await page.keyboard.press("Tab");
      stops.push(
        await page.evaluate(
          () =>
            document.activeElement.id || document.activeElement.className || document.activeElement.ariaLabel,
        ),
      );
    }
    assert.deepEqual(stops, [
      "home",
      "find-text",
      "help-button",
      "copy",
      "copy",
      "waterfall",
      "side",
      "Close the details",
      "id",
      "copy",
      "copy",
      "link",
    ]);
  },

  async nothing_is_wider_than_a_phone({ open, post }) {
    const posted = failing();
    await post(posted, login());
    for (const path of [
      "/",
      "/?service=nobody",
      `/trace/${posted.traceID}`,
      `/trace/${posted.traceID}#${posted.ids[1]}`,
    ]) {
      const page = await open(path, { viewport: { width: 360, height: 740 }, hasTouch: true });
      await page.waitForSelector("#rows a, .row, #no-match:visible");
      assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), 360, path);
      const beyond = await page.$$eval("body *:not(option, dialog *, svg *)", (nodes) =>
        nodes
          .filter((node) => node.checkVisibility() && node.getBoundingClientRect().right > 360.5)
          // An element may be wider if an ellipsis cuts it off, or if it scrolls in its own box.
          .filter((node) => !node.parentElement.closest("td, .name, h1, .graph"))
          .map((node) => node.outerHTML.slice(0, 100)),
      );
      assert.deepEqual(beyond, [], path);
    }
  },

  async light_and_dark_differ_and_both_can_be_read({ open, post }) {
    const posted = failing();
    await post(posted, login());
    const grounds = new Set();
    const remarks = [];
    for (const colorScheme of ["light", "dark"]) {
      for (const path of [
        "/",
        "/?service=nobody",
        `/trace/${posted.traceID}`,
        `/trace/${posted.traceID}?uiFind=exception#${posted.ids[1]}`,
      ]) {
        const page = await open(path, { colorScheme });
        await page.waitForSelector("#rows a, .row, #no-match:visible");
        grounds.add(await page.evaluate(() => getComputedStyle(document.body).backgroundColor));
        const { contrast, text } = await leastContrast(page);
        assert.ok(contrast >= 4.5, `${colorScheme} ${path}: ${contrast} of ${text}`);
        remarks.push(contrast);
      }
    }
    assert.equal(grounds.size, 2);
    return `the least contrast is ${Math.min(...remarks).toFixed(1)} to 1`;
  },

  async who_wants_no_motion_sees_none({ open, post }) {
    const animation = async (reducedMotion) => {
      await post(login());
      const page = await open("/", { reducedMotion });
      await page.waitForSelector("[data-state=live]");
      await page.waitForSelector("#rows a");
      await post(login());
      await page.waitForSelector("tr.new");
      return page.$eval("tr.new", (row) => getComputedStyle(row).animationName);
    };
    assert.equal(await animation("no-preference"), "arrived");
    assert.equal(await animation("reduce"), "none");
  },
};
