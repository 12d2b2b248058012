// Takes the screenshots of a login's trace, light and dark:
//
//     node screenshot.mjs --page http://127.0.0.1:16686 --trace <id> --out ../../../docs/images
//
// Without --trace, the script posts the spans of a made-up login to --otlp, and shows that trace.

import { parseArgs } from "node:util";
import { chromium } from "playwright-core";
import { login, post } from "./spans.mjs";

const { values: options } = parseArgs({
  options: {
    page: { type: "string", default: "http://127.0.0.1:16686" },
    otlp: { type: "string", default: "http://127.0.0.1:4318" },
    trace: { type: "string" },
    out: { type: "string", default: "." },
    browser: { type: "string", default: "/usr/bin/chromium" },
  },
});

if (!options.trace) {
  const posted = login();
  await post(options.otlp, posted);
  options.trace = posted.traceID;
}
const browser = await chromium.launch({ executablePath: options.browser, args: ["--no-sandbox"] });
for (const [colorScheme, name] of [
  ["light", "trace.png"],
  ["dark", "trace-dark.png"],
]) {
  const page = await browser.newPage({
    viewport: { width: 1280, height: 440 },
    deviceScaleFactor: 1.5,
    colorScheme,
  });
  await page.goto(`${options.page}/trace/${options.trace}`);
  await page.waitForFunction(() => document.querySelectorAll(".row").length >= 6);
  await page.waitForSelector("[data-state=live]");
  await page.screenshot({ path: `${options.out}/${name}` });
}
await browser.close();
