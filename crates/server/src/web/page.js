// The page: conversations, sending and stopping, settings, seats, load. Drawing is in views.js.

import * as store from "./store.js";
import { blank, headers, run } from "./stream.js";
import { Text, account, element, figures, replay, steps } from "./views.js";

const $ = (id) => document.getElementById(id);
const settings = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed", "draft_tokens"];
let conversation = store.fresh();
let running = null;
let model = "";

// --- settings -------------------------------------------------------------------------------------

function restore() {
  for (const id of settings) {
    const kept = localStorage.getItem(`kilotok.${id}`);
    if (kept !== null) $(id).value = kept;
    $(id).onchange = () => localStorage.setItem(`kilotok.${id}`, $(id).value);
  }
  // The key stays in this tab.
  $("key").value = sessionStorage.getItem("kilotok.key") ?? "";
  $("key").onchange = () => { sessionStorage.setItem("kilotok.key", $("key").value); start(); };
  const dark = localStorage.getItem("kilotok.theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = dark;
}

$("theme").onclick = () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("kilotok.theme", next);
};
$("options").onclick = () => {
  $("settings").hidden = !$("settings").hidden;
  $("options").setAttribute("aria-expanded", String(!$("settings").hidden));
};
$("menu").onclick = () => {
  const shown = $("side").classList.toggle("shown");
  $("menu").setAttribute("aria-expanded", String(shown));
};

const key = () => $("key").value.trim();

function request(messages, drafting) {
  const system = $("system").value.trim();
  const body = { model, messages: [] };
  if (system) body.messages.push({ role: "system", content: system });
  for (const m of messages) body.messages.push({ role: m.role, content: m.content });
  for (const id of settings.slice(1)) {
    if ($(id).value !== "") body[id] = Number($(id).value);
  }
  if (!drafting) body.draft_tokens = 0;
  return body;
}

// --- conversations --------------------------------------------------------------------------------

async function list() {
  const items = await store.all();
  $("conversations").replaceChildren(...items.map((c) => {
    const choose = element("button", { type: "button", textContent: c.title || "New conversation" });
    choose.onclick = () => { conversation = c; show(); list(); };
    const drop = element("button", { type: "button", textContent: "✕" });
    drop.setAttribute("aria-label", `Delete ${c.title}`);
    drop.onclick = async () => {
      await store.remove(c.id);
      if (c.id === conversation.id) { conversation = store.fresh(); show(); }
      list();
    };
    const item = element("li", {}, choose, drop);
    if (c.id === conversation.id) item.setAttribute("aria-current", "true");
    return item;
  }));
}

$("new").onclick = () => { conversation = store.fresh(); show(); list(); $("prompt").focus(); };
$("export").onclick = async () => {
  const text = JSON.stringify(await store.all(), null, 1);
  const link = element("a", { download: "kilotok.json", href: URL.createObjectURL(new Blob([text], { type: "application/json" })) });
  link.click();
  URL.revokeObjectURL(link.href);
};
$("import").onclick = () => $("file").click();
$("file").onchange = async () => {
  try {
    for (const c of store.parse(await $("file").files[0].text())) await store.save(c);
    list();
  } catch (error) {
    alert(`Not imported: ${error.message}`);
  }
};

// --- messages -------------------------------------------------------------------------------------

function button(text, action) {
  return element("button", { type: "button", textContent: text, onclick: action });
}

function userMessage(message, i) {
  const body = element("div", { className: "body", textContent: message.content });
  const edit = button("Edit", () => {
    $("prompt").value = message.content;
    conversation.messages.length = i;
    show();
    $("prompt").focus();
  });
  return element("article", { className: "message user" }, body, element("div", { className: "tools" }, edit));
}

// One answer: its nodes, and how to draw them.
class Answer {
  constructor(answer) {
    this.answer = answer;
    this.body = element("div", { className: "body" });
    this.thought = element("details", { className: "thought", hidden: true }, element("summary", { textContent: "Reasoning" }));
    this.thinking = document.createTextNode("");
    this.thought.append(this.thinking);
    this.shownThought = 0;
    this.figures = element("span", { className: "figures" });
    this.tools = element("div", { className: "tools" }, this.figures);
    this.extra = element("div");
    this.error = element("div", { className: "error", role: "alert" });
    this.node = element("div", {}, this.thought, this.body, this.error, this.tools, this.extra);
    this.text = new Text(this.body, key());
  }

  draw(finished = false) {
    const { answer } = this;
    if (answer.reasoning.length > this.shownThought) {
      this.thought.hidden = false;
      this.thinking.appendData(answer.reasoning.slice(this.shownThought));
      this.shownThought = answer.reasoning.length;
    }
    this.text.draw(answer.content, finished);
    this.figures.textContent = figures(answer);
    this.error.textContent = answer.error ?? "";
    if (finished) this.finish();
  }

  finish() {
    const { answer } = this;
    const toggle = (name, make) => {
      let shown = false;
      const node = button(name, () => {
        shown = !shown;
        this.extra.replaceChildren(...(shown ? [make()] : []));
        node.setAttribute("aria-pressed", String(shown));
      });
      node.setAttribute("aria-pressed", "false");
      return node;
    };
    this.tools.append(button("Copy", () => navigator.clipboard?.writeText(answer.content)));
    if (answer.steps?.length) {
      this.tools.append(toggle("Steps", () => steps(answer)), toggle("Account", () => account(answer)),
        button("Replay", () => {
          this.stopReplay?.abort();
          this.stopReplay = new AbortController();
          replay(answer, this.extra, this.stopReplay.signal);
        }));
    }
  }
}

function assistantMessage(message, i) {
  const view = new Answer({ ...blank(), ...message });
  const article = element("article", { className: "message assistant" }, view.node);
  view.draw(true);
  view.tools.append(button("Regenerate", () => { conversation.messages.length = i; show(); answer(); }),
    button("Branch", async () => {
      conversation = { ...store.fresh(), title: `${conversation.title} (branch)`, messages: conversation.messages.slice(0, i + 1) };
      await store.save(conversation);
      show();
      list();
    }));
  return article;
}

function show() {
  $("messages").replaceChildren(...conversation.messages.map((m, i) =>
    m.role === "user" ? userMessage(m, i) : assistantMessage(m, i)));
  box.scrollTop = box.scrollHeight;
}

// --- answering ------------------------------------------------------------------------------------

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
}

// The end stays in view when it was: while text is drawn, and when a block comes back rendered and larger.
const box = $("messages");
let following = true;
const follow = () => { if (following) box.scrollTop = box.scrollHeight; };
box.onscroll = () => { following = box.scrollHeight - box.scrollTop - box.clientHeight < 80; };
new MutationObserver(() => requestAnimationFrame(follow)).observe(box, { childList: true, subtree: true });

// Draws with a frame, every second one at most: the eye reads no faster, and layout costs as much each time.
const DRAW_EVERY_MS = 30;
function drawer(views) {
  let asked = false;
  let drawn = 0;
  const frame = (now) => {
    if (now - drawn < DRAW_EVERY_MS) { requestAnimationFrame(frame); return; }
    asked = false;
    drawn = now;
    views.forEach((view) => view.draw());
    follow();
  };
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(frame);
  };
}

async function stream(view, drafting, draw) {
  try {
    await run(request(conversation.messages, drafting), key(), running.signal, view.answer, draw);
  } catch (error) {
    if (error.name !== "AbortError") view.answer.error = error.message;
    else view.answer.finish = "stopped";
  }
}

async function answer() {
  running = new AbortController();
  busy(true);
  const compare = $("compare").checked;
  const views = [new Answer(blank())];
  if (compare) views.push(new Answer(blank()));
  const holder = element("article", { className: `message assistant ${compare ? "pair" : ""}` }, ...views.map((v) => v.node));
  $("messages").append(holder);
  const draw = drawer(views);
  await stream(views[0], true, draw);
  if (compare) await stream(views[1], false, draw);
  views.forEach((view) => view.draw(true));
  if (compare) {
    const same = views[0].answer.content === views[1].answer.content;
    const note = same ? "Same text with and without drafting." : "The texts differ (they do, unless temperature is 0 or the seed is fixed).";
    $("messages").append(element("p", { className: "figures same", textContent: note }));
  }
  $("spoken").textContent = views[0].answer.error ?? "The answer is complete.";
  const { content, reasoning, steps, metrics, usage, finish, error, tokens } = views[0].answer;
  conversation.messages.push({ role: "assistant", content, reasoning, steps, metrics, usage, finish, error, tokens });
  if (!compare) holder.replaceWith(assistantMessage(conversation.messages.at(-1), conversation.messages.length - 1));
  running = null;
  busy(false);
  await store.save(conversation);
  list();
  seat();
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  conversation.messages.push({ role: "user", content: text });
  conversation.title ||= text.slice(0, 60);
  show();
  answer();
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
};
$("stop").onclick = () => running?.abort();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

// --- seats, load, applying ------------------------------------------------------------------------

const minutes = (seconds) => `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;

async function seat(method = "GET") {
  const response = await fetch("/api/seat", { method, headers: headers(key()) }).catch(() => null);
  const box = $("seat");
  if (!response) return;
  const state = await response.json();
  box.hidden = state.state === "open" || response.status === 404;
  // A server that lets everyone in has nothing to apply for.
  $("apply").hidden = state.state === "open" && !key();
  const action = (text, verb) => button(text, () => seat(verb));
  if (response.status === 401) {
    box.hidden = false;
    box.replaceChildren("This server needs an API key: enter it under Settings, or apply for access there.");
  } else if (!response.ok) {
    box.replaceChildren(state.error.message);
  } else if (state.state === "none") {
    const why = { idle: "The seat was released: unused for too long. ", expired: "The session is over. " }[state.last_end] ?? "";
    box.replaceChildren(`${why}A seat is needed to chat; ${state.entries_left} entries left today.`, action("Enter the queue", "POST"));
  } else if (state.state === "waiting") {
    box.replaceChildren(`Waiting: number ${state.position} of ${state.waiting}.`, action("Leave", "DELETE"));
  } else if (state.state === "seated") {
    const idle = state.idle_left_s < 90 ? ` Unused: it is released in ${minutes(state.idle_left_s)}.` : "";
    box.replaceChildren(`Seat: ${minutes(state.left_s)} left.${idle}`, action("Give it back", "DELETE"));
  }
}

async function load() {
  if (document.hidden) return;
  const response = await fetch("/load", { headers: headers(key()) }).catch(() => null);
  if (!response?.ok) { $("load").textContent = ""; return; }
  const l = await response.json();
  $("load").textContent = `${l.running} running · ${l.waiting} waiting · KV ${(100 * l.kv_share).toFixed(0)} % · cache hits ${(100 * l.prefix_hit_rate).toFixed(0)} %`;
}

$("apply").onsubmit = async (event) => {
  event.preventDefault();
  const body = JSON.stringify(Object.fromEntries(new FormData(event.target)));
  const response = await fetch("/api/apply", { method: "POST", headers: headers(""), body });
  const reply = await response.json();
  $("applied").textContent = response.ok ? "Applied. You will hear by the contact you gave." : reply.error.message;
};

async function start() {
  const response = await fetch("/v1/models", { headers: headers(key()) }).catch(() => null);
  if (response?.ok) {
    const { data } = await response.json();
    model = data[0].id;
    $("model").textContent = `${data[0].id} · ${data[0].context_length} tokens`;
  }
  seat();
  load();
}

restore();
show();
list();
start();
setInterval(load, 2000);
setInterval(() => { if (!$("seat").hidden && !document.hidden) seat(); }, 5000);
