// The page of `openelm serve`: a conversation, or for a base model a text that it goes on with. What was said is kept in
// this browser. Words enter the page as text only, never as HTML.
"use strict";

const DEFAULTS = { system: "", temperature: 0.7, top_p: 0.95, max_tokens: 512, seed: null };
const STORE = "openelm";
const KEY = "openelm-key"; // of the session's store: gone with the tab
const at = (id) => document.getElementById(id);

const state = restored();
let model = null; // {id, chat}, once the server has said so
let key = restoredKey();
let writing = null; // the AbortController of what is being written
let written = Promise.resolve(); // once it is

/** What went wrong, in words for people. */
class Problem extends Error {
  constructor(message, code = "") {
    super(message);
    this.code = code;
  }
}

// What is kept

/** turns: {role, content}; forgotten: of these, how many no longer fit; text: what stands in the box; before: a base
 * model's text before what it wrote last. */
function restored() {
  const state = { turns: [], forgotten: 0, text: "", before: null, figures: "", settings: { ...DEFAULTS } };
  try {
    const kept = JSON.parse(localStorage.getItem(STORE)) ?? {};
    const { settings, ...rest } = kept;
    Object.assign(state.settings, settings);
    if (Array.isArray(rest.turns) && rest.turns.every((turn) => typeof turn?.content === "string")) Object.assign(state, rest);
  } catch {
    // Not ours, or no store allowed: begin anew.
  }
  return state;
}

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // A full or forbidden store: the conversation lasts as long as the page.
  }
}

function keepKey(given) {
  key = given;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // As above.
  }
}

function restoredKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

// The server

/** A good response; asks for the key where the server wants one. Throws Problem, or AbortError after a stop. */
async function call(path, options = {}) {
  for (;;) {
    const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    await askForKey(key ? "The server does not accept this key." : "This server asks for a key.");
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const again = response.headers.get("Retry-After");
  const words = body?.error?.message ?? `The server answered with ${response.status}.`;
  return new Problem(again ? `${words} Try again in ${again} s.` : words, body?.error?.code ?? "");
}

function askForKey(why) {
  const dialog = at("locked");
  at("locked-why").textContent = why;
  at("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.onclose = () => {
      if (dialog.returnValue !== "give") return reject(new Problem("The server asks for a key: send again to give it."));
      keepKey(at("key").value.trim());
      at("key").value = "";
      resolve();
    };
  });
}

/** The objects of a stream of server-sent events, up to [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (held + value).split(/\r?\n/);
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Ask the model and give each piece to `show`; what became of it. A stop is no error, but all else is a Problem. */
async function write(path, prompt, show) {
  const { system, seed, ...sampling } = state.settings;
  const body = { model: model.id, ...prompt, ...sampling, stream: true, stream_options: { include_usage: true } };
  if (seed !== null) body.seed = seed;
  const { signal } = writing;
  const watch = new Watch();
  let reason = "";
  try {
    const response = await call(path, { method: "POST", body: JSON.stringify(body), signal });
    for await (const event of events(response)) {
      if (event.error) throw new Problem(event.error.message, event.error.code);
      const [choice] = event.choices ?? [];
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      if (piece) show(piece);
      if (piece) watch.saw();
      reason = choice?.finish_reason || reason;
      watch.tokens = event.usage?.completion_tokens ?? watch.tokens;
    }
    if (!reason) throw new Problem("The answer broke off: the server closed the connection.");
  } catch (error) {
    if (!signal.aborted) throw error instanceof Problem ? error : new Problem(`The answer broke off: ${error.message}.`);
    reason = "stopped";
  }
  const ends = { length: ` · cut off at ${watch.tokens}`, stopped: " · stopped", content_filter: " · held back by the guard" };
  watch.show(ends[reason] ?? "");
  return reason;
}

/** Counts pieces, which are tokens as a rule, until the server says how many tokens there were. */
class Watch {
  tokens = 0;
  #first = 0;
  #last = 0;
  #shown = 0;

  saw() {
    const now = performance.now();
    if (!this.#first) this.#first = now;
    this.#last = now;
    this.tokens += 1;
    if (now - this.#shown > 250) {
      this.#shown = now;
      this.show();
    }
  }

  show(end = "") {
    const seconds = (this.#last - this.#first) / 1000;
    const rate = (this.tokens - 1) / seconds;
    const speed = seconds > 0 && rate > 0 ? ` · ${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s` : "";
    state.figures = `${this.tokens} token${this.tokens === 1 ? "" : "s"}${speed}${end}`;
    at("figures").textContent = state.figures;
  }
}

// Answers

/** Run `work` as the one thing that is being written; its problems are shown. */
async function busy(work) {
  writing = new AbortController();
  complain("");
  draw();
  at("spoken").textContent = "The model is writing.";
  try {
    at("spoken").textContent = await work();
  } catch (problem) {
    at("spoken").textContent = "";
    complain(problem.message);
  } finally {
    writing = null;
    keep();
    draw();
  }
}

async function ask(question) {
  const turn = { role: "user", content: question };
  state.turns.push(turn);
  const article = drawTurn(turn);
  await busy(() => answer(null));
  if (state.turns.at(-1) !== turn) return;
  // Nothing was answered: the question goes back to where it was written.
  state.turns.pop();
  article.remove();
  state.text = at("text").value ||= question;
  fit();
  keep();
  draw();
}

/** Answer the last question. Where nothing comes, `before`, an earlier answer, is put back. */
async function answer(before) {
  const turn = { role: "assistant", content: "" };
  const { turns } = state;
  const seen = () => turns.slice(state.forgotten, -1).map(({ role, content }) => ({ role, content }));
  turns.push(turn);
  const article = drawTurn(turn);
  article.classList.add("writing");
  const text = article.querySelector(".words").appendChild(document.createTextNode(""));
  const show = (piece) => {
    const follows = isAtEnd(at("log"));
    turn.content += piece;
    text.appendData(piece);
    if (follows) toEnd(at("log"));
  };
  toEnd(at("log"));
  try {
    const reason = await fitted(seen, (messages) => write("v1/chat/completions", { messages }, show));
    return turn.content || (reason === "stopped" ? "Stopped." : "The model had nothing to say.");
  } finally {
    article.classList.remove("writing");
    if (!turn.content) {
      turns.pop();
      article.remove();
      if (before) turns.push(before), drawTurn(before);
    }
  }
}

/** Run `work` on the conversation; its older half is forgotten, as often as it is longer than the model's context. */
async function fitted(seen, work) {
  for (;;) {
    const { system } = state.settings;
    const turns = seen();
    try {
      return await work(system.trim() ? [{ role: "system", content: system }, ...turns] : turns);
    } catch (problem) {
      if (problem.code !== "context_length_exceeded" || turns.length < 3) throw problem;
      state.forgotten += 2 * Math.ceil((turns.length - 1) / 4); // questions with their answers
      markForgotten();
    }
  }
}

async function goOn() {
  const field = at("text");
  state.before = field.value;
  await busy(async () => {
    const reason = await write("v1/completions", { prompt: state.before }, (piece) => {
      const follows = isAtEnd(field);
      field.value += piece;
      state.text = field.value;
      if (follows) toEnd(field);
    });
    return field.value.slice(state.before.length) || (reason === "stopped" ? "Stopped." : "The model ended the text.");
  });
}

async function writeAnew() {
  at("text").focus();
  if (model.chat) {
    at("turns").lastElementChild.remove();
    const before = state.turns.pop();
    await busy(() => answer(before));
  } else {
    const field = at("text");
    const old = field.value;
    field.value = state.before;
    await goOn();
    if (field.value === state.before) state.text = field.value = old;
  }
}

// What is seen

function draw() {
  const text = model !== null && !model.chat;
  document.body.classList.toggle("text", text);
  document.body.classList.toggle("busy", writing !== null);
  at("log").setAttribute("aria-label", text ? "About this page" : "Conversation");
  at("label").textContent = text ? "Text" : "Message";
  at("text").placeholder = text ? "Once upon a time" : "Message";
  at("text").readOnly = text && writing !== null;
  at("send").textContent = writing ? "Stop" : text ? "Continue" : "Send";
  at("hint").textContent = writing
    ? "Esc stops"
    : text ? "Ctrl+Enter continues" : "Enter sends · Shift+Enter for a new line";
  at("figures").textContent = state.figures;
  at("again").hidden = writing !== null || (text ? state.before === null : state.turns.at(-1)?.role !== "assistant");
  at("empty").hidden = state.turns.length > 0 && !text;
}

function drawTurn(turn) {
  const article = at("turn").content.firstElementChild.cloneNode(true);
  const isUser = turn.role === "user";
  article.className = isUser ? "user" : "model";
  article.querySelector("h2").textContent = isUser ? "You" : "Model";
  article.querySelector(".words").textContent = turn.content;
  article.querySelector(".copy").onclick = (event) => copy(turn.content, event.target);
  return at("turns").appendChild(article);
}

function markForgotten() {
  [...at("turns").children].forEach((article, n) => article.classList.toggle("forgotten", n < state.forgotten));
}

function complain(words) {
  at("problem").textContent = words;
  at("problem").hidden = !words;
}

function isAtEnd(part) {
  return part.scrollHeight - part.scrollTop - part.clientHeight < 80;
}

function toEnd(part) {
  part.scrollTop = part.scrollHeight;
}

/** The box grows with what is in it; a base model's fills the page. */
function fit() {
  const field = at("text");
  field.style.height = "auto";
  if (!document.body.classList.contains("text")) field.style.height = `${field.scrollHeight + 2}px`;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https, or where it is not allowed: by way of a field that is copied from.
    const field = document.body.appendChild(document.createElement("textarea"));
    field.className = "unseen";
    field.value = text;
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// What is done

async function submit() {
  const field = at("text");
  if (writing || !field.value.trim() || !(model || (await connect()))) return;
  const question = field.value;
  if (model.chat) {
    field.value = state.text = "";
    fit();
  }
  written = model.chat ? ask(question) : goOn();
}

async function begin() {
  writing?.abort();
  await written;
  Object.assign(state, { turns: [], forgotten: 0, text: "", before: null, figures: "" });
  at("turns").replaceChildren();
  at("text").value = "";
  at("text").focus();
  complain("");
  fit();
  keep();
  draw();
}

function showSettings() {
  for (const field of at("values").elements) if (field.name) field.value = state.settings[field.name] ?? "";
}

function readSetting({ target }) {
  if (!target.name || !target.checkValidity()) return; // marked as wrong; the last good value counts
  const isNumber = target.type === "number";
  state.settings[target.name] = isNumber ? (target.value === "" ? null : Number(target.value)) : target.value;
  keep();
}

function toggleSettings() {
  const panel = at("settings");
  panel.hidden = !panel.hidden;
  at("set").setAttribute("aria-expanded", String(!panel.hidden));
  showSettings();
}

function onKey(event) {
  if (event.key !== "Escape" || at("locked").open) return;
  if (writing) writing.abort();
  else if (!at("settings").hidden) {
    toggleSettings();
    at("set").focus();
  }
}

function onEnter(event) {
  if (event.key !== "Enter" || event.isComposing || event.shiftKey) return;
  const isText = document.body.classList.contains("text");
  if (isText && !event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  submit();
}

/** Ask the server which model it has; whether it said so. */
async function connect() {
  try {
    const [found] = (await (await call("v1/models")).json()).data;
    const name = found.id.split("/").at(-1);
    at("name").textContent = name;
    at("name").title = found.id;
    document.title = `${name} · OpenELM`;
    model = { id: found.id, chat: found.chat !== false };
  } catch (problem) {
    complain(problem.message);
    return false;
  }
  complain("");
  draw();
  fit();
  return true;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (writing) writing.abort();
  else submit();
});
at("text").addEventListener("keydown", onEnter);
at("text").addEventListener("input", () => {
  fit();
  state.text = at("text").value;
  keep();
  if (!model || model.chat) return;
  state.before = null;
  at("again").hidden = true;
});
at("new").addEventListener("click", begin);
at("set").addEventListener("click", toggleSettings);
at("again").addEventListener("click", () => (written = writeAnew()));
at("values").addEventListener("input", readSetting);
at("values").addEventListener("submit", (event) => event.preventDefault());
at("defaults").addEventListener("click", () => {
  state.settings = { ...DEFAULTS };
  showSettings();
  keep();
});
document.addEventListener("keydown", onKey);
addEventListener("pagehide", keep);
setInterval(() => writing && keep(), 1000);

// A reload before the first word of an answer: the question goes back, too.
if (state.turns.at(-1)?.content === "") state.turns.pop();
if (state.turns.at(-1)?.role === "user") {
  const { content } = state.turns.pop();
  state.text ||= content;
}
at("text").value = state.text;
state.turns.forEach(drawTurn);
markForgotten();
draw();
toEnd(at("log"));
at("text").focus();
connect();
