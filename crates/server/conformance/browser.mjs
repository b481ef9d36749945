// The chat page in headless Chromium, against the scripted server (speeds and acceptance are simulated):
//   node browser.mjs URL [SEATS_URL KEY1 KEY2] [--pictures DIR] [--timings]
// With `--timings` the figures of the fast stream have to hold too (on a machine with nothing else to do); without
// it they are printed, and what is checked is what no other program can change: how often the page draws.
// browser.sh beside this file starts the servers, makes the keys and calls this. Every check prints a line;
// the last line is `N passed, N failed`, and the exit status says the same.

import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import puppeteer from "puppeteer-core";

// `PAGE_FILES=crates/server/src/web` tries edited files of the page without a new server.
const at = process.argv.indexOf("--pictures");
const pictures = at > 0 ? process.argv.splice(at, 2)[1] : null;
const timed = process.argv.indexOf("--timings");
if (timed > 0) process.argv.splice(timed, 1);
const timings = timed > 0;
const [url, seatsUrl, ...keys] = process.argv.slice(2);
const axeSource = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const results = [];
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function check(name, work) {
  try {
    const said = await work();
    results.push(true);
    console.log(`ok   ${name}${said ? `: ${said}` : ""}`);
  } catch (error) {
    results.push(false);
    console.log(`FAIL ${name}: ${error.message}`);
  }
}

function expect(holds, message) {
  if (!holds) throw new Error(message);
}

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", headless: true,
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
const faults = [];

async function open(target, size = { width: 1200, height: 800 }) {
  const context = await browser.createBrowserContext();
  const page = await context.newPage();
  await page.setBypassCSP(true); // for axe only: the page's own files load under its policy in `policy` below
  await page.setViewport(size);
  // A 401 is what a page without its key is meant to meet.
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("console", (m) => { if (m.type() === "error" && !m.text().includes("401")) faults.push(m.text()); });
  if (process.env.PAGE_FILES) {
    await page.setRequestInterception(true);
    page.on("request", (asked) => {
      const path = new URL(asked.url()).pathname;
      const name = path === "/" ? "index.html" : path.match(/^\/page\/(\w+\.(?:js|css))$/)?.[1];
      if (!name) return asked.continue();
      const types = { html: "text/html", js: "text/javascript", css: "text/css" };
      asked.respond({ contentType: types[name.split(".").at(-1)], body: readFileSync(`${process.env.PAGE_FILES}/${name}`) });
    });
  }
  await page.goto(target, { waitUntil: "networkidle0" });
  return page;
}

const text = (page, selector) => page.$eval(selector, (node) => node.textContent);
const idle = (page) => page.waitForFunction(() => document.querySelector("#stop").hidden, { timeout: 60000 });
const set = (page, id, value) => page.$eval(`#${id}`, (node, v) => { node.value = v; node.onchange?.(); }, value);

async function say(page, words) {
  await page.focus("#prompt");
  await page.keyboard.type(words);
  await page.keyboard.press("Enter");
}

async function press(page, name) {
  const found = await page.evaluate((n) => {
    const all = [...document.querySelectorAll("button")].filter((b) => b.textContent === n && !b.hidden);
    all.at(-1)?.click();
    return all.length;
  }, name);
  expect(found, `there is no button ${name}`);
}

async function axe(page) {
  await page.evaluate(axeSource);
  const { violations } = await page.evaluate(() => globalThis.axe.run());
  expect(violations.length === 0, violations.map((v) => `${v.id} (${v.nodes[0].html.slice(0, 120)})`).join("; "));
}

async function seatSays(page, words) {
  const says = (w) => document.querySelector("#seat").textContent.includes(w);
  await page.waitForFunction(says, { timeout: 20000, polling: 200 }, words).catch(async () => {
    throw new Error(`expected ${words}; the page says: ${await text(page, "#seat")}`);
  });
}

const picture = (page, name) => pictures && page.screenshot({ path: `${pictures}/${name}.png` });

/**
 * Processor time of the page's thread, which other programs change little; puppeteer's own metrics count the time
 * that a task took, waits for a core included.
 */
async function taskSeconds(page) {
  page.session ??= await page.createCDPSession();
  await page.session.send("Performance.enable", { timeDomain: "threadTicks" });
  const { metrics } = await page.session.send("Performance.getMetrics");
  return { task: metrics.find((m) => m.name === "TaskDuration").value, at: performance.now() / 1000 };
}

/** One long answer: its rate, how often it was drawn, and what the page's thread did meanwhile. */
async function fast(page) {
  await page.evaluate(() => { globalThis.long.length = 0; globalThis.gaps.length = 0; globalThis.drawn = 0; });
  const before = await taskSeconds(page);
  await say(page, "As fast as you can");
  await page.waitForFunction(() => !document.querySelector("#stop").hidden);
  await idle(page);
  const after = await taskSeconds(page);
  const seconds = after.at - before.at;
  const share = (after.task - before.task) / seconds;
  const { long, gap, drawn } = await page.evaluate(() => (
    { long: globalThis.long, gap: Math.max(...globalThis.gaps), drawn: globalThis.drawn }));
  const shown = await text(page, ".message.assistant:last-child .figures");
  const rate = Number(shown.match(/([\d.]+) tok\/s/)?.[1]);
  const said = `${rate} tokens/s, drawn ${(drawn / seconds).toFixed(0)} times a second, ${(100 * share).toFixed(1)} % of a core on the page's thread, longest gap of frames ${gap.toFixed(0)} ms, ${long.length} long tasks`;
  return { rate, share, long, drawn, seconds, said };
}

const page = await open(url);

await check("conversation by keyboard, Markdown rendered", async () => {
  await set(page, "max_tokens", "300");
  await say(page, "Hello there");
  await page.waitForSelector(".message.assistant");
  await idle(page);
  await page.waitForSelector(".message.assistant pre.code");
  const strong = await page.$$eval(".message.assistant strong", (all) => all.length);
  expect(strong > 0, "no bold text was rendered");
});

await check("acceptance view agrees with the step log", async () => {
  const log = await page.evaluate(() => new Promise((resolve, reject) => {
    const asked = indexedDB.open("kilotok", 1);
    asked.onerror = reject;
    asked.onsuccess = () => {
      const all = asked.result.transaction("conversations").objectStore("conversations").getAll();
      all.onsuccess = () => resolve(all.result[0].messages.at(-1));
    };
  }));
  await press(page, "Steps");
  const shown = await page.$$eval(".steps .step", (all) => all.map((n) => ({ title: n.title, text: n.textContent })));
  expect(shown.length === log.steps.length && shown.length > 0, `${shown.length} blocks, ${log.steps.length} steps`);
  log.steps.forEach((step, i) => {
    const part = `${step.accepted} of ${step.width - 1} drafts accepted, ${step.tokens} tokens`;
    expect(shown[i].title.includes(part), `step ${i}: ${shown[i].title}; expected ${part}`);
  });
  const counts = [];
  log.steps.forEach((s) => { counts[s.accepted] = (counts[s.accepted] ?? 0) + 1; });
  const histogram = log.metrics.speculative_decoding.acceptance_histogram;
  const decoded = histogram.reduce((a, b) => a + b, 0);
  expect(Math.abs(decoded - log.steps.length) <= 1, `histogram has ${decoded} steps, the log ${log.steps.length}`);
  expect(shown.map((s) => s.text).join("") === log.content, "the blocks do not make the text");
  return `${shown.length} steps`;
});

await check("account view", async () => {
  await press(page, "Account");
  await page.waitForSelector(".account .split");
  await picture(page, "page-light");
});

for (const theme of ["light", "dark"]) {
  await check(`axe, ${theme}`, async () => {
    await page.evaluate((t) => { document.documentElement.dataset.theme = t; }, theme);
    await axe(page);
    await press(page, "Steps");
    if (theme === "dark") await picture(page, "page-dark");
  });
}

await check("axe with settings open", async () => {
  await page.click("#options");
  await axe(page);
  await page.click("#options");
});

await check("regenerate replaces the answer", async () => {
  await press(page, "Regenerate");
  await page.waitForFunction(() => !document.querySelector("#stop").hidden);
  await idle(page);
  const count = await page.$$eval(".message.assistant", (all) => all.length);
  expect(count === 1, `${count} answers`);
});

await check("stop by Escape frees the engine", async () => {
  await set(page, "max_tokens", "5000");
  await say(page, "Talk for long");
  await page.waitForFunction(() => document.querySelectorAll(".message.assistant").length === 2
    && document.querySelector(".message.assistant:last-child .body").textContent.length > 100);
  await page.keyboard.press("Escape");
  await idle(page);
  for (let i = 0; ; i++) {
    const load = await (await fetch(`${url}/load`)).json();
    if (load.running === 0) break;
    expect(i < 20, `${load.running} still running after 2 s`);
    await pause(100);
  }
});

await check("conversation kept over a reload", async () => {
  await page.reload({ waitUntil: "networkidle0" });
  await page.click("#conversations button");
  const count = await page.$$eval(".message.user", (all) => all.length);
  expect(count === 2, `${count} messages`);
});

await check(timings ? "1,500 tokens/s: no task of 50 ms, at most 30 % of a core" : "a fast stream is drawn at most 50 times a second", async () => {
  await press(page, "New conversation");
  await set(page, "max_tokens", "5000");
  await page.evaluate(() => {
    globalThis.long = [];
    new PerformanceObserver((l) => l.getEntries().forEach((e) => globalThis.long.push(e.duration))).observe({ type: "longtask" });
    globalThis.gaps = [];
    let last = performance.now();
    let text = 0;
    const frame = (now) => {
      globalThis.gaps.push(now - last);
      last = now;
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
    // One call a task that changed the messages, however many nodes it changed; a change of the text is a draw.
    new MutationObserver(() => {
      const length = document.querySelector(".message.assistant:last-child .body")?.textContent.length ?? 0;
      if (length !== text) globalThis.drawn += 1;
      text = length;
    }).observe(document.querySelector("#messages"), { childList: true, characterData: true, subtree: true });
  });
  // Three tries with `--timings`: what else runs on the machine shows in these figures.
  const said = [];
  for (let i = 0; i < (timings ? 3 : 1); i += 1) {
    const found = await fast(page);
    said.push(found.said);
    const most = 10 + found.seconds * 50; // every 30 ms, and blocks that come back rendered
    expect(found.drawn > 0 && found.drawn <= most, `at most ${most.toFixed(0)} draws: ${found.drawn}; ${found.said}`);
    if (!timings) return found.said;
    expect(found.rate >= 1000, `the server was too slow to ask this: ${found.said}`);
    if (found.long.length === 0 && found.share <= 0.3) return said.join("; before: ");
    await press(page, "New conversation");
  }
  throw new Error(said.join("; "));
});

await check("mobile: nothing runs over the side, menu opens, axe", async () => {
  const phone = await open(url, { width: 360, height: 640, isMobile: true, hasTouch: true });
  await set(phone, "max_tokens", "200");
  await say(phone, "On a phone");
  await phone.waitForSelector(".message.assistant");
  await idle(phone);
  const wide = await phone.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  expect(wide <= 0, `${wide} px too wide`);
  await phone.click("#menu");
  await axe(phone);
  await phone.click("#menu");
  await picture(phone, "page-mobile");
});

await check("the content policy lets the page's own files run", async () => {
  const context = await browser.createBrowserContext();
  const plain = await context.newPage();
  const refused = [];
  plain.on("console", (m) => { if (m.type() === "error") refused.push(m.text()); });
  await plain.goto(url, { waitUntil: "networkidle0" });
  expect((await text(plain, "#model")).includes("tokens"), "the model is not named");
  expect(refused.length === 0, refused.join("; "));
});

if (seatsUrl) {
  await check("seats: one sits, one waits and moves up", async () => {
    const pages = [];
    for (const key of keys.slice(0, 2)) {
      const one = await open(seatsUrl);
      await set(one, "key", key);
      await seatSays(one, "A seat is needed");
      await press(one, "Enter the queue");
      pages.push(one);
      await pause(500);
    }
    const [first, second] = pages;
    await first.bringToFront(); // a page out of sight asks for nothing
    await seatSays(first, "Seat:");
    await second.bringToFront();
    await seatSays(second, "Waiting: number 1 of 1");
    await picture(second, "page-queue");
    await axe(second);
    await first.bringToFront();
    await press(first, "Give it back");
    await second.bringToFront();
    await seatSays(second, "Seat:");
  });
}

await check("no error in any page", () => expect(faults.length === 0, faults.join("; ")));
await browser.close();
const failed = results.filter((ok) => !ok).length;
console.log(`${results.length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
