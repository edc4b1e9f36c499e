// node check.mjs BROWSER DIRECTORY PAGE...
// Opens each page on a desktop and a phone, light and dark, offline. Writes a picture of the first screen and of
// the whole page beside it, and tells in JSON what axe-core, the network and the layout say.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join } from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const SCREENS = { desktop: { width: 1280, height: 800 }, phone: { width: 390, height: 844 } };
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const [executablePath, directory, ...pages] = process.argv.slice(2);

async function check(browser, page, screen, colorScheme) {
  const context = await browser.newContext({ viewport: SCREENS[screen], colorScheme, isMobile: screen === "phone" });
  const tab = await context.newPage();
  const requests = [];
  tab.on("request", (request) => requests.push(request.url()));
  await tab.goto(pathToFileURL(page).href);
  const picture = (part) => join(directory, `${basename(page, ".html")}-${screen}-${colorScheme}-${part}.png`);
  await tab.screenshot({ path: picture("first") });
  await tab.screenshot({ path: picture("whole"), fullPage: true });
  await tab.evaluate(AXE);
  const told = await tab.evaluate(async () => {
    const found = await axe.run();
    const root = document.documentElement;
    const machine = document.querySelector(".machine");
    return {
      violations: found.violations.map((x) => [x.id, x.impact, x.nodes.map((n) => n.html.slice(0, 160))]),
      passes: found.passes.length,
      overflow: root.scrollWidth - root.clientWidth,
      background: getComputedStyle(document.body).backgroundColor,
      answered: machine && machine.getBoundingClientRect().bottom <= innerHeight,
    };
  });
  await context.close();
  return { page: basename(page), screen, scheme: colorScheme, requests: requests.slice(1), ...told };
}

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const told = [];
for (const page of pages)
  for (const screen of Object.keys(SCREENS))
    for (const scheme of ["light", "dark"]) told.push(await check(browser, page, screen, scheme));
await browser.close();
console.log(JSON.stringify(told));
