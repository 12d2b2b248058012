// Drives the trace page in a real browser, against a backend that has no traces yet:
//
//     cargo dev backend
//     node run.mjs [--page http://127.0.0.1:16686] [--otlp http://127.0.0.1:4318] [--only text]
//
// With `--controls`, the script checks only the buttons. For them, `cargo dev` must run.
//
// Every check has its own page. An error on the page's console fails the check.

import { parseArgs } from "node:util";
import { chromium } from "playwright-core";
import controls from "./checks/controls.mjs";
import hostile from "./checks/hostile.mjs";
import large from "./checks/large.mjs";
import list from "./checks/list.mjs";
import reach from "./checks/reach.mjs";
import trace from "./checks/trace.mjs";
import { post, postLogs } from "./spans.mjs";

const { values: options } = parseArgs({
  options: {
    page: { type: "string", default: "http://127.0.0.1:16686" },
    otlp: { type: "string", default: "http://127.0.0.1:4318" },
    browser: { type: "string", default: "/usr/bin/chromium" },
    only: { type: "string", default: "" },
    controls: { type: "boolean", default: false },
  },
});

const browser = await chromium.launch({ executablePath: options.browser, args: ["--no-sandbox"] });
const all = options.controls ? [controls] : [list, trace, hostile, large, reach];
const checks = all.flatMap((checks) => Object.entries(checks));
const wanted = checks.filter(([name]) => name.includes(options.only));
let failed = 0;
for (const [name, check] of wanted) {
  const sentence = name.replaceAll("_", " ");
  try {
    const remark = await run(check);
    console.log(`ok    ${sentence}${remark ? `: ${remark}` : ""}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL  ${sentence}\n${error.stack}`);
  }
}
await browser.close();
console.log(`${wanted.length - failed} of ${wanted.length} checks passed`);
process.exitCode = failed || wanted.length === 0 ? 1 : 0;

/**
 * Runs a check with the arguments that it needs: `open(path, options)`, `post(...traces)`, `postLogs(trace,
 * ...records)`, and the backend's address.
 */
async function run(check) {
  const contexts = [];
  const errors = [];
  async function open(path, { base = options.page, allow = /^$/, prepare, ...settings } = {}) {
    const context = await browser.newContext({ viewport: { width: 1400, height: 800 }, ...settings });
    contexts.push(context);
    context.setDefaultTimeout(60_000);
    const page = await context.newPage();
    const note = (text) => allow.test(text) || errors.push(text);
    page.on("pageerror", (error) => note(String(error.stack ?? error)));
    page.on("console", (message) => message.type() === "error" && note(message.text()));
    await prepare?.(page);
    await page.goto(base + path);
    return page;
  }
  try {
    const remark = await check({
      open,
      post: (...traces) => post(options.otlp, ...traces),
      postLogs: (trace, ...records) => postLogs(options.otlp, trace, ...records),
      base: options.page,
    });
    if (errors.length) throw new Error(`the page said on its console:\n${errors.join("\n")}`);
    return remark;
  } finally {
    for (const context of contexts) await context.close();
  }
}
