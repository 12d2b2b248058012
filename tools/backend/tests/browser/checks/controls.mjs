// Checks the buttons that `cargo dev` adds to the page.

import assert from "node:assert/strict";
import { eventually, tree } from "../ask.mjs";

export default {
  async a_press_opens_its_trace_and_says_what_to_look_for({ open }) {
    const page = await open("/", { allow: /404/ });
    const remark = () => page.textContent("#controls p");
    await page.getByRole("button", { name: "Malformed" }).click();
    await page.waitForURL("**/trace/*");
    await eventually(() => tree(page), ["POST /usercenter/v1/user/login"]);
    assert.match(await remark(), /^login: 400 Bad Request\. .*one span/);
    // The buttons are on the page of a trace too.
    await page.getByRole("button", { name: "Log in" }).click();
    await eventually(async () => (await tree(page)).length, 6);
    assert.match(await remark(), /^login: 200 OK/);
  },

  async a_part_is_stopped_and_started_and_the_button_says_which({ open }) {
    const page = await open("/", { allow: /404/ });
    await page.getByRole("button", { name: "Stop usercenter" }).click();
    await eventually(async () => /answered with 503/.test(await page.textContent("#controls p")), true);
    await page.getByRole("button", { name: "Start usercenter" }).click();
    await page.getByRole("button", { name: "Stop usercenter" }).waitFor();
    await page.getByRole("button", { name: "Load" }).click();
    await page.waitForSelector("#controls [aria-pressed=true]");
    await page.getByRole("button", { name: "Load" }).click();
    await page.waitForSelector("#controls [aria-pressed=true]", { state: "detached" });
  },

  async the_buttons_fit_on_a_phone({ open }) {
    const page = await open("/", { viewport: { width: 360, height: 740 }, hasTouch: true });
    await page.getByRole("button", { name: "Log in" }).waitFor();
    assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), 360);
  },
};
