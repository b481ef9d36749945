// What is drawn of an answer: text block by block, steps with their acceptance, figures and charts.
//
// While an answer streams, drawing happens once for each animation frame and only appends: finished
// blocks of Markdown are rendered by the server and never touched again, the open block is plain text.

import { headers } from "./stream.js";

export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// End of the last block that is closed: a blank line outside a code fence.
export function closedEnd(text, from) {
  let at = from, end = from, fence = null;
  while (at < text.length) {
    const stop = text.indexOf("\n", at);
    if (stop < 0) break;
    const line = text.slice(at, stop);
    const mark = line.match(/^\s{0,3}(`{3,}|~{3,})/);
    at = stop + 1;
    if (mark && !fence) fence = mark[1];
    else if (mark && fence && mark[1][0] === fence[0] && mark[1].length >= fence.length) { fence = null; end = at; }
    else if (!fence && line.trim() === "") end = at;
  }
  return end;
}

function copyButtons(node) {
  for (const pre of node.querySelectorAll("pre.code")) {
    pre.tabIndex = 0;
    const button = element("button", { type: "button", textContent: "Copy" });
    button.onclick = () => navigator.clipboard?.writeText(pre.querySelector("code").textContent);
    pre.append(button);
  }
}

const RENDER_EVERY_MS = 250;

// The text of an answer, drawn as it grows.
export class Text {
  constructor(node, key) {
    this.node = node;
    this.key = key;
    this.done = 0;
    this.shown = 0;
    this.rendered = 0;
    this.open = element("div", { className: "open" });
    this.tail = document.createTextNode("");
    this.open.append(this.tail);
    node.append(this.open);
  }

  // Closed blocks go to the renderer together, a few times a second: at 1,500 tokens/s they close faster.
  draw(text, finished) {
    const due = performance.now() - this.rendered >= RENDER_EVERY_MS;
    const end = finished ? text.length : due ? closedEnd(text, this.done) : this.done;
    if (end > this.done) {
      this.rendered = performance.now();
      this.block(text.slice(this.done, end));
      this.done = this.shown = end;
      this.tail.data = "";
    }
    if (text.length > this.shown) {
      this.tail.appendData(text.slice(this.shown));
      this.shown = text.length;
    }
  }

  // Shown as plain text at once, as HTML when the server has rendered and sanitised it.
  async block(source) {
    const node = element("div", { className: "raw", textContent: source });
    this.node.insertBefore(node, this.open);
    const response = await fetch("/api/render",
      { method: "POST", headers: headers(this.key), body: source }).catch(() => null);
    if (!response?.ok) return;
    const parsed = new DOMParser().parseFromString(await response.text(), "text/html");
    node.replaceChildren(...parsed.body.childNodes);
    node.className = "";
    copyButtons(node);
  }
}

const shade = (step) => {
  const share = step.width > 1 ? step.accepted / (step.width - 1) : 0;
  return Math.min(3, Math.floor(share * 4));
};

function stepSpan(step, i) {
  const title = `step ${i}: position ${step.position}, ${step.accepted} of ${step.width - 1} drafts accepted, `
    + `${step.tokens} tokens, draft ${(step.draft_us / 1000).toFixed(2)} ms, verify ${(step.verify_us / 1000).toFixed(2)} ms`;
  return element("span", { className: `step a${shade(step)}`, title, textContent: step.text });
}

// Every verify step as a block.
export function steps(answer) {
  const node = element("div", { className: "raw steps", tabIndex: 0, role: "group" });
  node.setAttribute("aria-label", "Steps: each block is one verification");
  answer.steps.forEach((step, i) => node.append(stepSpan(step, i)));
  return node;
}

// The finished stream again, four times slower.
export async function replay(answer, node, signal) {
  const view = element("div", { className: "raw steps" });
  node.replaceChildren(view);
  let before = answer.steps[0]?.at ?? 0;
  for (const [i, step] of answer.steps.entries()) {
    await new Promise((resolve) => setTimeout(resolve, Math.min(1000, (step.at - before) * 4)));
    if (signal.aborted) return;
    before = step.at;
    view.append(stepSpan(step, i));
  }
}

// Speed now (last second), on average, and how the answer began. They stay after the end.
export function figures(answer) {
  const parts = [];
  const ms = answer.metrics;
  const span = answer.last && answer.last - answer.first;
  if (answer.tokens) parts.push(`${answer.tokens} tokens`);
  const now = answer.last - answer.started;
  const recent = answer.steps.slice(answer.steps.findLastIndex((s) => now - s.at >= 1000) + 1);
  if (!ms && recent.length > 1) {
    const time = recent.at(-1).at - recent[0].at;
    const count = recent.slice(1).reduce((n, s) => n + s.tokens, 0);
    if (time > 0) parts.push(`${(count / time * 1000).toFixed(0)} tok/s now`);
  }
  if (ms) parts.push(`${ms.tokens_per_second.toFixed(1)} tok/s`);
  else if (span > 0) parts.push(`${(answer.tokens / span * 1000).toFixed(1)} tok/s average`);
  const first = ms?.time_to_first_token_ms ?? (answer.first && answer.first - answer.started);
  if (first) parts.push(`first token ${first.toFixed(0)} ms`);
  if (ms) {
    parts.push(`queue ${ms.queue_time_ms.toFixed(1)} ms`);
    parts.push(`${ms.speculative_decoding.mean_acceptance_length.toFixed(2)} tokens a step`);
    const usage = answer.usage;
    if (usage) parts.push(`prompt ${usage.prompt_tokens} (${usage.prompt_tokens_details.cached_tokens} cached)`);
    if (ms.simulated) parts.push("acceptance simulated");
  }
  return parts.join(" · ");
}

const SVG = "http://www.w3.org/2000/svg";

function svg(width, height, label) {
  const node = document.createElementNS(SVG, "svg");
  for (const [k, v] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img" })) node.setAttribute(k, v);
  node.setAttribute("aria-label", label);
  return node;
}

function shape(tag, properties) {
  const node = document.createElementNS(SVG, tag);
  for (const [k, v] of Object.entries(properties)) node.setAttribute(k, v);
  return node;
}

function histogram(counts) {
  const most = Math.max(1, ...counts);
  const node = svg(counts.length * 16 + 8, 48, `Steps by accepted drafts: ${counts.map((n, i) => `${i}: ${n}`).join(", ")}`);
  counts.forEach((n, i) => {
    const height = Math.round(40 * n / most);
    node.append(shape("rect", { x: 6 + i * 16, y: 44 - height, width: 12, height }));
  });
  return node;
}

function sparkline(answer) {
  const values = answer.steps.slice(-200).map((s) => s.accepted + 1);
  const most = Math.max(1, ...values);
  const node = svg(204, 48, `Tokens of each of the last ${values.length} steps`);
  const x = (i) => 2 + i * 200 / Math.max(1, values.length - 1);
  const points = values.map((v, i) => `${x(i).toFixed(1)},${(45 - 40 * v / most).toFixed(1)}`).join(" ");
  node.append(shape("polyline", { points }));
  return node;
}

// Time split, histogram, sparkline, rate of each position.
export function account(answer) {
  const ms = answer.metrics;
  const node = element("div", { className: "account" });
  if (!ms) return node;
  const parts = [["queue", ms.queue_time_ms], ["prefill", ms.prefill_time_ms], ["draft", ms.draft_time_ms],
    ["verify", ms.verify_time_ms], ["sample", ms.sample_time_ms], ["host", ms.host_time_ms]];
  const whole = parts.reduce((n, [, v]) => n + v, 0) || 1;
  const bar = element("div", { className: "split", role: "img" });
  const text = parts.map(([name, v]) => `${name} ${v.toFixed(1)} ms`).join(", ");
  bar.setAttribute("aria-label", text);
  for (const [name, v] of parts) {
    const part = element("span", { className: name, title: `${name} ${v.toFixed(2)} ms` });
    part.style.width = `${100 * v / whole}%`;
    bar.append(part);
  }
  const counts = ms.speculative_decoding.acceptance_histogram;
  const total = counts.reduce((a, b) => a + b, 0) || 1;
  const reached = counts.map((_, i) => counts.slice(i).reduce((a, b) => a + b, 0) / total).slice(1);
  const rates = reached.map((r, i) => `${i + 1}: ${(100 * r).toFixed(0)} %`).join("  ");
  node.append(bar, element("div", { className: "figures", textContent: text }),
    element("div", { className: "charts" }, histogram(counts), sparkline(answer)),
    element("div", { className: "figures", textContent: reached.length ? `steps that accepted so many drafts or more: ${rates}` : "no drafts" }));
  return node;
}
