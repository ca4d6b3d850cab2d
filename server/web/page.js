// The page: a conversation with the server, its session, and its memory.

import { ApiError, apiKey, call, stream } from "/web/api.js";
import { $, button, copy, el, number, open, percent, say, show } from "/web/dom.js";
import { render } from "/web/markdown.js";
import { drawFigures, drawLegend, drawParts } from "/web/memory.js";
import * as settings from "/web/settings.js";
import { store } from "/web/store.js";

const ASK = "/v1/chat/completions";
const MEMORY = "/v1/atlas/memory";
const log = $("log");
const prompt = $("prompt");
const problem = $("problem");

const state = {
  name: null, // of the session; null before its first message
  messages: [], // {role, content, thought, gates, figures, end}
  known: [], // sessions of the server
  info: null, // of the session's memory
  memory: true, // whether the server has one
  window: 0, // tokens of a new session's window
  server: "loading",
  contextSize: 0,
  writing: null, // the AbortController of the answer that is being written
};

// --- the server -----------------------------------------------------------------------------------------------------
const WORDS = { ready: "Ready", loading: "Loading the model…", away: "Not reachable, trying again…", failed: "The engine has failed", draining: "Shutting down…" };

async function look() {
  let found;
  try {
    found = await call("/");
  } catch (error) {
    found = { status: error.status ? "failed" : "away" };
  }
  const before = state.server;
  state.server = WORDS[found.status] ? found.status : "loading";
  if (before !== state.server || !$("state").dataset.seen) {
    $("state").dataset.state = state.server;
    $("state").dataset.seen = "yes";
    $("state").textContent = WORDS[state.server];
  }
  if (found.model) $("model").textContent = found.model;
  if (state.server === "ready" && before !== "ready") await arrived();
}

async function arrived() {
  try {
    const { data } = await call("/v1/models");
    $("model").textContent = data[0]?.id ?? "";
    state.contextSize = data[0]?.meta?.n_ctx_train ?? 0;
  } catch (error) {
    if (error.status === 401 || error.status === 403) askKey();
    return;
  }
  state.memory = await call("/v1/atlas/status").then(
    ({ data }) => data.enabled && !data.memory_unavailable,
    (error) => error.status !== 503, // not enabled
  );
  const config = state.memory ? await call("/v1/atlas/config").catch(() => null) : null;
  state.window = config?.data.window_size ?? 0;
  await refresh();
}

async function watch() {
  for (let away = 0; ; away = state.server === "ready" ? 0 : away + 1) {
    await look();
    await new Promise((done) => setTimeout(done, state.server === "ready" ? 10000 : Math.min(3000, 500 + 250 * away)));
  }
}

/** Waits until the server answers again. */
async function back(signal) {
  for (;;) {
    await new Promise((done) => setTimeout(done, 700));
    signal.throwIfAborted();
    await look();
    if (state.server === "ready") return;
  }
}

function askKey() {
  $("key-value").value = "";
  $("key-keep").checked = apiKey.kept;
  open("key", async () => {
    apiKey.set($("key-value").value.trim(), $("key-keep").checked);
    await call("/v1/models");
    show(problem, null);
    await arrived();
  }, $("key-value"));
}

// --- sessions -------------------------------------------------------------------------------------------------------
async function refresh() {
  const note = $("session-note");
  try {
    const found = [];
    let after = null;
    do {
      const page = await call(`${MEMORY}/list`, after ? { limit: 500, after } : { limit: 500 });
      found.push(...page.contexts);
      after = page.next;
    } while (after);
    state.known = found;
    note.hidden = true;
  } catch (error) {
    state.known = [];
    note.hidden = false;
    note.textContent = state.memory ? error.message : "This server has no memory: conversations are in this browser alone.";
  }
  drawSessions();
  await remember();
}

const onServer = (name) => state.known.find((one) => one.context_id === name);

function drawSessions() {
  const rows = new Map(store.names().map((name) => [name, store.read(name)?.updated ?? 0]));
  for (const one of state.known) rows.set(one.context_id, Math.max(rows.get(one.context_id) ?? 0, one.last_used * 1000));
  const names = [...rows.keys()].sort((a, b) => rows.get(b) - rows.get(a) || a.localeCompare(b));
  $("session-list").replaceChildren(
    ...names.map((name) => {
      const made = button(el("span", {}, name), () => choose(name), { "aria-current": name === state.name ? "true" : null });
      const tokens = onServer(name)?.tokens;
      if (tokens !== undefined) made.append(el("span", { class: "note" }, number(tokens), el("span", { class: "hidden" }, " tokens")));
      return el("li", {}, made);
    }),
  );
  $("session-name").textContent = state.name ?? "New session";
  for (const id of ["rename", "branch", "save", "load", "delete"]) $(id).disabled = state.name === null || state.writing !== null;
}

function choose(name) {
  if (state.writing) {
    state.writing.abort(); // what there is of the answer is kept with its own conversation
    state.writing = null;
    busy(false);
  }
  state.name = name;
  state.messages = (name && store.read(name)?.messages) || [];
  state.info = null;
  store.current = name;
  show(problem, null);
  drawSessions();
  drawAll();
  remember();
  close();
  if (matchMedia("(min-width: 64rem)").matches) prompt.focus();
}

/** Keeps a conversation, the current one unless another is named, in this browser. */
function keep(name = state.name, messages = state.messages) {
  if (!name) return;
  if (!store.write(name, { updated: Date.now(), messages })) show(problem, new Error("This browser has no more room for conversations; delete some"));
  store.current = state.name;
}

function newName() {
  const now = new Date();
  const two = (value) => String(value).padStart(2, "0");
  const base = `${now.getFullYear()}-${two(now.getMonth() + 1)}-${two(now.getDate())} ${two(now.getHours())}.${two(now.getMinutes())}.${two(now.getSeconds())}`;
  return unused(base);
}

function unused(base) {
  const taken = new Set([...store.names(), ...state.known.map((one) => one.context_id)]);
  if (!taken.has(base)) return base;
  for (let count = 2; ; count++) if (!taken.has(`${base} (${count})`)) return `${base} (${count})`;
}

/** Has the server do something with a session; one that it does not have is in this browser alone. */
async function ifKnown(path, body) {
  if (!state.memory) return null;
  try {
    return await call(`${MEMORY}/${path}`, body);
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

function askName(title, done, value, work) {
  $("name-title").textContent = title;
  $("name-done").textContent = done;
  $("name-value").value = value;
  open("name", async () => {
    const name = $("name-value").value.trim();
    if (name === state.name) return;
    await work(name);
    await refresh();
  }, $("name-value"));
  $("name-value").select();
}

function taken(name) {
  if (store.read(name) || onServer(name)) throw new Error(`name: a session called “${name}” exists already`);
}

$("new-session").onclick = () => {
  choose(null);
  prompt.focus();
};
$("rename").onclick = () =>
  askName("Rename the session", "Rename", state.name, async (name) => {
    taken(name);
    await ifKnown("rename", { session_id: state.name, target: name });
    store.remove(state.name);
    state.name = name;
    keep();
    say(`Renamed to ${name}`);
  });
$("branch").onclick = () => branch(state.messages.length);

function branch(count) {
  askName("Branch off a session", "Branch", unused(`${state.name} – branch`), async (name) => {
    taken(name);
    await ifKnown("fork", { session_id: state.name, target: name });
    state.messages = structuredClone(state.messages.slice(0, count));
    state.name = name;
    keep();
    drawAll();
    say(`Now in ${name}`);
  });
}

$("save").onclick = () =>
  attempt(async () => {
    const found = await call(`${MEMORY}/save`, { context_id: state.name, state: { messages: state.messages } });
    await refresh();
    said($("save"), "Saved");
    say(`Saved, ${number(found.bytes)} bytes`);
  });
$("load").onclick = () =>
  sure("Load the save point?", `“${state.name}” goes back to how it was saved; what was said since is forgotten.`, "Load", async () => {
    const found = await call(`${MEMORY}/load`, { context_id: state.name });
    if (Array.isArray(found.state?.messages)) state.messages = found.state.messages;
    keep();
    drawAll();
    await refresh();
    say("Loaded");
  });
$("delete").onclick = () =>
  sure("Delete the session?", `“${state.name}” and its memory are deleted, here and on the server.`, "Delete", async () => {
    await ifKnown("delete", { context_id: state.name });
    store.remove(state.name);
    say(`${state.name} deleted`);
    choose(null);
    await refresh();
  });

function sure(title, text, done, work) {
  $("sure-title").textContent = title;
  $("sure-text").textContent = text;
  $("sure-done").textContent = done;
  open("sure", work, $("sure-done"));
}

async function attempt(work) {
  show(problem, null);
  try {
    await work();
  } catch (error) {
    show(problem, error);
  }
}

function said(node, text) {
  const before = node.textContent;
  node.textContent = text;
  setTimeout(() => (node.textContent = before), 1500);
}

// --- the memory -----------------------------------------------------------------------------------------------------
async function remember() {
  const { name } = state;
  let info = null;
  if (name && onServer(name)) info = await call(`${MEMORY}?session_id=${encodeURIComponent(name)}`).catch(() => null);
  if (name !== state.name) return;
  state.info = info;
  drawParts(shape());
  const { enabled } = settings.chosen().atlas;
  $("memory-state").textContent = enabled === false || !state.memory ? "off" : info ? `${number(info.total_updates)} writes` : "";
  drawLast();
}

/** What the memory holds; of a session that has read nothing, how large its window will be. */
const shape = () => state.info ?? { window_size: settings.chosen().atlas.window_size ?? state.window };

function drawLast() {
  const last = [...state.messages].reverse().find((one) => one.role === "assistant");
  drawFigures({ ...last?.figures, contextSize: state.contextSize, session: onServer(state.name)?.tokens });
}

// --- the conversation -----------------------------------------------------------------------------------------------
function drawAll() {
  log.replaceChildren(...state.messages.map(article));
  if (!state.messages.length) {
    const tokens = onServer(state.name)?.tokens;
    log.append(
      el(
        "div",
        { class: "empty" },
        el("h3", {}, state.name ? "Nothing of this conversation is in this browser." : "What would you like to talk about?"),
        el("p", {}, tokens ? `The session goes on where it was: it has read ${number(tokens)} tokens. If it was saved here, Load brings its text.` : "A session remembers what leaves the model’s window, and goes on after a restart of the server."),
      ),
    );
  }
  drawLast();
  log.scrollTop = log.scrollHeight;
}

function article(message) {
  const index = state.messages.indexOf(message);
  const user = message.role === "user";
  const body = el("div", { class: "body" });
  const node = el("article", { class: message.role }, el("h3", {}, user ? "You" : "Answer"));
  if (message.thought) node.append(el("details", { class: "thought" }, el("summary", {}, "Reasoning"), el("p", {}, message.thought)));
  node.append(body);
  if (user) body.textContent = message.content;
  else drawBody(body, message);
  const foot = el("div", { class: "foot" });
  node.append(foot);
  const copying = button("Copy", () => copy(message.content, copying), { "aria-label": user ? "Copy this message" : "Copy this answer" });
  foot.append(copying);
  if (user) foot.append(button("Edit", () => edit(node, message), { "aria-label": "Edit this message" }));
  else {
    if (index === state.messages.length - 1) foot.append(button("Regenerate", regenerate));
    foot.append(button("Branch here", () => branch(index + 1), { "aria-label": "Branch off after this answer" }));
    const notes = [message.end, message.figures?.gate !== undefined && message.gates?.length ? `${percent(message.figures.gate)} from the memory` : null];
    foot.append(el("p", { class: "note" }, notes.filter(Boolean).join(" · ")));
  }
  return node;
}

function drawBody(body, message) {
  render(body, message.content, message.gates);
  if (!message.gates?.length || body.hasAttribute("tabindex")) return;
  body.tabIndex = 0;
  body.setAttribute("role", "group");
  body.setAttribute("aria-label", "Answer; the arrow keys tell what the memory gave to each token");
}

function edit(node, message) {
  const area = el("textarea", { "aria-label": "Edit your message" });
  area.value = message.content;
  const cancel = () => {
    const again = article(message);
    form.replaceWith(again);
    again.querySelector("[aria-label^=Edit]").focus();
  };
  const form = el("form", { class: "edit user" }, area, el("p", { class: "row" }, el("button", { type: "submit", class: "main" }, "Send again"), button("Cancel", cancel)));
  form.onsubmit = (event) => {
    event.preventDefault();
    const content = area.value.trim();
    if (content) attempt(() => resend(message, content));
  };
  form.onkeydown = (event) => {
    if (event.key === "Escape") cancel();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  };
  node.replaceWith(form);
  area.focus();
}

async function resend(message, content) {
  if (state.writing) return;
  const index = state.messages.indexOf(message);
  // an edited first message is, to the server, new text that follows what the session holds
  if (!state.messages.slice(0, index).some((one) => one.role === "assistant") && onServer(state.name)) await ifKnown("reset", { session_id: state.name });
  state.messages = [...state.messages.slice(0, index), { role: "user", content }];
  keep();
  drawAll();
  await answer();
}

async function regenerate() {
  if (state.writing) return;
  if (state.messages.at(-1)?.role === "assistant") state.messages.pop();
  drawAll();
  await answer({ regenerate: true });
}

function request(more) {
  const { atlas, chat, system } = settings.chosen();
  const messages = state.messages.filter((one) => one.content).map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const off = atlas.enabled === false || !state.memory;
  return {
    messages,
    stream: true,
    stream_options: { include_usage: true },
    ...chat,
    atlas: off ? { enabled: false } : { ...atlas, session_id: state.name, token_gates: true, ...more },
  };
}

/** Writes the answer to the conversation as it stands. */
async function answer(more = {}) {
  const control = (state.writing = new AbortController());
  const message = { role: "assistant", content: "", thought: "", gates: [], figures: {}, end: null };
  const { name, messages } = state;
  const body = request(more);
  messages.push(message);
  log.querySelector(".empty")?.remove();
  const node = article(message);
  log.append(node);
  node.classList.add("writing");
  log.setAttribute("aria-busy", "true");
  busy(true);
  say("Writing the answer");
  const drawing = drawer(node, message);
  try {
    for (;;) {
      try {
        for await (const chunk of stream(ASK, body, control.signal)) {
          take(chunk, message);
          drawing.soon();
        }
        break;
      } catch (error) {
        // nothing of the answer has come, so nothing is lost by asking again when the server is back
        if (!(error instanceof ApiError) || !error.passing || message.content || message.thought) throw error;
        show(problem, new Error(`${error.message}. Your message is sent again as soon as it answers; Stop gives up.`));
        await back(control.signal);
        show(problem, null);
      }
    }
    show(problem, null);
  } catch (error) {
    if (error.name === "AbortError") message.end = "stopped";
    else if (state.writing !== control) message.end = "failed";
    else if (error.status === 0) {
      message.end = "the connection was lost here";
      show(problem, new Error(`${error.message}. Regenerate asks again; the session goes on.`));
    } else {
      message.end = "failed";
      show(problem, error);
      if (error.status === 401) askKey();
      const setting = settings.settingOf(error);
      if (setting) problem.append(" ", button("Open settings", () => openSettings(setting)));
    }
    if (!message.content && !message.thought) messages.splice(messages.indexOf(message), 1);
  }
  drawing.stop();
  log.setAttribute("aria-busy", "false");
  message.counting = undefined;
  keep(name, messages);
  if (state.writing === control) {
    state.writing = null;
    drawLast();
    busy(false);
    const focused = log.contains(document.activeElement) || document.activeElement === document.body;
    if (state.messages.includes(message)) {
      const drawn = article(message);
      node.replaceWith(drawn);
      // only the last answer can be regenerated
      for (const other of log.querySelectorAll("article.assistant .foot")) {
        if (!drawn.contains(other)) [...other.children].find((one) => one.textContent === "Regenerate")?.remove();
      }
      say(message.content ? `Answer: ${message.content.slice(0, 600)}` : "There is no answer");
    } else node.remove();
    if (focused) prompt.focus();
  }
  await refresh();
}

function take(chunk, message) {
  const figures = message.figures;
  const choice = chunk.choices?.[0];
  if (choice) {
    const { content = "", reasoning_content: thought = "" } = choice.delta ?? {};
    message.content += content;
    message.thought += thought;
    if (choice.token_gates?.length) gates(choice.token_gates, content, message);
    if (choice.finish_reason === "length") message.end = "cut off at the limit of tokens";
    if (content || thought) count(message, choice.token_gates?.length || 1);
  }
  if (chunk.timings) {
    figures.rate = chunk.timings.predicted_per_second;
    figures.promptRate = chunk.timings.prompt_n > 1 ? chunk.timings.prompt_per_second : 0;
    figures.tokens = chunk.timings.predicted_n;
  }
  if (chunk.atlas_stats) {
    const stats = chunk.atlas_stats;
    Object.assign(figures, { gate: stats.blend_ratio_actual, history: stats.history, reused: stats.tokens_reused, degraded: stats.degraded });
  }
  if (chunk.usage) figures.context = chunk.usage.total_tokens;
}

/** Tokens and the speed of the last two seconds, while an answer is written. */
function count(message, tokens) {
  const now = performance.now();
  message.figures.tokens = (message.figures.tokens ?? 0) + tokens;
  const seen = (message.counting ??= { times: [], decoder: null });
  seen.times.push([now, tokens]);
  while (now - seen.times[0][0] > 2000) seen.times.shift();
  const span = (now - seen.times[0][0]) / 1000;
  if (span > 0.3) message.figures.rate = seen.times.slice(1).reduce((sum, [, some]) => sum + some, 0) / span;
}

/** Puts the gates of a chunk's tokens beside its text. */
function gates(tokens, content, message) {
  const seen = (message.counting ??= { times: [], decoder: null });
  seen.decoder ??= new TextDecoder();
  const texts = tokens.map((one) => seen.decoder.decode(Uint8Array.from(one.bytes), { stream: true }));
  const covered = message.gates.reduce((sum, [length]) => sum + length, 0);
  const before = message.content.length - content.length;
  if (covered < before) message.gates.push([before - covered, 0]);
  if (texts.join("") === content) tokens.forEach((one, index) => message.gates.push([texts[index].length, one.gate]));
  else if (content) message.gates.push([content.length, tokens.reduce((sum, one) => sum + one.gate, 0) / tokens.length]);
}

/** Draws an answer as it grows, no more often than the page can. */
function drawer(node, message) {
  const body = node.querySelector(".body");
  let waiting = 0;
  let pause = 40;
  const draw = () => {
    waiting = 0;
    const began = performance.now();
    const below = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    drawBody(body, message);
    if (message.thought) {
      let details = node.querySelector(".thought");
      if (!details) body.before((details = el("details", { class: "thought" }, el("summary", {}, "Reasoning"), el("p"))));
      details.querySelector("p").textContent = message.thought;
    }
    const shares = message.gates.slice(-64);
    drawFigures({ ...message.figures, gate: shares.length ? shares.reduce((sum, [, gate]) => sum + gate, 0) / shares.length : undefined });
    drawParts(shape(), message.figures.tokens ?? 0);
    if (below) log.scrollTop = log.scrollHeight;
    pause = Math.max(40, 3 * (performance.now() - began));
  };
  return {
    soon: () => (waiting ||= setTimeout(draw, pause)),
    stop: () => clearTimeout(waiting),
  };
}

function busy(writing) {
  $("send").hidden = writing;
  $("stop").hidden = !writing;
  drawSessions();
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const content = prompt.value.trim();
  if (!content || state.writing) return;
  if (state.name === null) state.name = newName();
  state.messages.push({ role: "user", content });
  prompt.value = "";
  show(problem, null);
  keep();
  log.querySelector(".empty")?.remove();
  log.append(article(state.messages.at(-1)));
  log.scrollTop = log.scrollHeight;
  answer();
};
prompt.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
};
$("stop").onclick = () => {
  state.writing?.abort();
  prompt.focus();
};

// --- tokens ---------------------------------------------------------------------------------------------------------
const tip = $("tip");

function point(token) {
  tip.hidden = !token;
  if (!token) return;
  tip.textContent = `memory ${percent(Number(token.dataset.gate))}`;
  const box = token.getClientRects()[0];
  tip.style.left = `${Math.min(box.left, innerWidth - 120)}px`;
  tip.style.top = `${box.top < 40 ? box.bottom + 4 : box.top - 26}px`;
}
log.addEventListener("pointerover", (event) => point(event.target.closest(".t")));
log.addEventListener("pointerleave", () => point(null));
log.addEventListener("scroll", () => point(null), { passive: true });
log.addEventListener("focusin", (event) => {
  const token = event.target.closest(".t");
  point(token);
  if (token) say(`${token.textContent.trim() || "space"}: ${percent(Number(token.dataset.gate))}`);
});
log.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const body = event.target.closest?.(".body");
  if (!step || !body || !event.target.matches(".t, .body")) return;
  const tokens = [...body.querySelectorAll(".t")];
  const at = tokens.indexOf(event.target);
  const next = tokens[at < 0 ? 0 : Math.max(0, Math.min(tokens.length - 1, at + step))];
  if (next) {
    event.preventDefault();
    next.focus();
  }
});

// --- settings, theme, panels ----------------------------------------------------------------------------------------
async function openSettings(id) {
  await attempt(async () => {
    await settings.draw();
    $("keep-chats").checked = store.keeps;
    open("settings", async () => {
      settings.take();
      store.keeps = $("keep-chats").checked;
      await remember();
    }, (typeof id === "string" && $(id)) || $("set-system"));
  });
}
$("open-settings").onclick = openSettings;
$("settings-reset").onclick = () => {
  for (const control of $("settings-form").querySelectorAll("[data-name], #set-system")) control.value = "";
};
$("open-key").onclick = () => {
  $("settings").close();
  askKey();
};
$("forget-all").onclick = () => {
  store.forget();
  $("settings").close();
  choose(null);
  setTheme("auto");
  say("Forgotten");
  refresh();
};
$("open-about").onclick = () => open("about", null, $("about").querySelector("[data-close]"));

const THEMES = { auto: ["Auto", "as the system"], light: ["Light", "light"], dark: ["Dark", "dark"] };
function setTheme(theme) {
  if (theme === "auto") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("atlas.theme");
  } else {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("atlas.theme", theme);
  }
  $("theme").textContent = THEMES[theme][0];
  $("theme").setAttribute("aria-label", `Theme: ${THEMES[theme][1]}`);
}
$("theme").onclick = () => {
  const names = Object.keys(THEMES);
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(names[(names.indexOf(now) + 1) % names.length]);
};

/** Panels beside the conversation, which lie over it on narrow screens. */
for (const id of ["sessions", "memory"]) {
  $(`show-${id}`).onclick = () => {
    const opens = !$(id).hasAttribute("data-open");
    close();
    $(id).toggleAttribute("data-open", opens);
    $(`show-${id}`).setAttribute("aria-expanded", String(opens));
    if (opens) $(id).querySelector("button, summary")?.focus();
  };
}
function close() {
  for (const id of ["sessions", "memory"]) {
    $(id).removeAttribute("data-open");
    $(`show-${id}`).setAttribute("aria-expanded", "false");
  }
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  const panel = document.querySelector(".side[data-open]");
  if (panel) {
    close();
    $(`show-${panel.id}`).focus();
  } else if (state.writing && !log.querySelector(".edit")) $("stop").click();
});

// --- the beginning --------------------------------------------------------------------------------------------------
setTheme(document.documentElement.dataset.theme ?? "auto");
drawLegend();
drawParts(null);
state.name = store.current;
state.messages = (state.name && store.read(state.name)?.messages) || [];
drawSessions();
drawAll();
if (!document.activeElement || document.activeElement === document.body) prompt.focus({ preventScroll: true });
watch();
