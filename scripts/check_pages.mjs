// Open pages in Chromium: pictures at 1,280 and 390 pixels, light and dark, and what axe-core finds wrong with them.
//
//   npm install puppeteer-core axe-core        (anywhere; NODE_PATH=that/node_modules)
//   node scripts/check_pages.mjs PAGE.html ... [--pictures FOLDER] [--full]
//
// Prints one line of JSON per page, width and colour scheme; exits with 1 if axe finds anything or a page is too wide.
import { createRequire } from "node:module";
import path from "node:path";

const require = createRequire(path.join(process.env.NODE_PATH?.split(":")[0] ?? process.cwd(), "x.js"));
const puppeteer = require("puppeteer-core");
const axe = require.resolve("axe-core");

const words = process.argv.slice(2);
const at = words.indexOf("--pictures");
const folder = at < 0 ? "" : words.splice(at, 2)[1];
const full = words.includes("--full");
const pages = words.filter(word => !word.startsWith("--"));

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"],
});
let wrong = 0;
for (const file of pages) {
  for (const [width, height] of [[1280, 900], [390, 844]]) {
    for (const scheme of ["light", "dark"]) {
      const page = await browser.newPage();
      await page.setViewport({ width, height, isMobile: width < 500, hasTouch: width < 500 });
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await page.setBypassCSP(true); // the page's policy allows no script but its own, so not axe either
      const requests = [];
      page.on("request", request => { if (!/^(file|data|blob):/.test(request.url())) requests.push(request.url()); });
      await page.goto("file://" + path.resolve(file));
      if (folder) {
        const name = `${path.basename(file, ".html")}-${width}-${scheme}.png`;
        await page.screenshot({ path: path.join(folder, name), fullPage: full });
      }
      await page.addScriptTag({ path: axe });
      const found = await page.evaluate(async () => (await window.axe.run()).violations.map(rule =>
        ({ rule: rule.id, impact: rule.impact, nodes: rule.nodes.map(node => node.target.join(" ") + ": " + node.failureSummary) })));
      const tooWide = await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
      wrong += found.length + requests.length + Number(tooWide);
      console.log(JSON.stringify({ page: path.basename(file), width, scheme, tooWide, requests, axe: found }));
      await page.close();
    }
  }
}
await browser.close();
process.exit(wrong ? 1 : 0);
