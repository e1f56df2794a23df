// The chat page: asks /v1/chat/completions, shows the stream as it comes. Keeps nothing but the key, and that in the tab.
"use strict";

const element = (id) => document.getElementById(id);
const talk = element("talk"), question = element("question"), send = element("send"), stop = element("stop");
let messages = [];
let pictures = []; // data: URIs that go with the next question
let running = null; // the AbortController of the answer that is being written

const KEY = "mlx_edge_key";

async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) return response;
    sessionStorage.removeItem(KEY);
    await askKey();
  }
}

function askKey() {
  const lock = element("lock");
  return new Promise((resolve) => {
    lock.addEventListener("close", () => {
      const key = element("key").value.trim();
      element("key").value = "";
      if (key) sessionStorage.setItem(KEY, key);
      resolve();
    }, { once: true });
    if (!lock.open) lock.showModal();
  });
}

function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${Math.round(bytes / 1e6)} MB`;
}

async function showModels() {
  const response = await ask("/v1/models");
  if (!response.ok) return;
  const { data } = await response.json();
  const select = element("model");
  const known = [...select.options].map((option) => option.value).join("\n");
  if (known !== data.map((model) => model.id).join("\n")) {
    const chosen = select.value;
    select.replaceChildren(...data.map((model) => new Option(model.id, model.id)));
    if (chosen) select.value = chosen;
  }
  const memory = data.map((model) => model.x_memory && model.x_memory.process_bytes).find(Boolean);
  element("memory").textContent = memory ? size(memory) : "";
}

// Text, and blocks between ``` as code; nothing of it is ever HTML.
function render(target, text) {
  const parts = text.split(/^```[^\n]*\n?/m);
  target.replaceChildren(...parts.map((part, index) => {
    if (index % 2 === 0) return document.createTextNode(part);
    const pre = document.createElement("pre");
    pre.textContent = part.replace(/\n$/, "");
    return pre;
  }));
}

function addMessage(role, text) {
  element("hint").hidden = true;
  const article = document.createElement("article");
  article.className = role;
  const body = document.createElement("div");
  body.className = "text";
  article.append(body);
  if (role === "user") body.textContent = text;
  else render(body, text);
  talk.append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

function addThoughts(article) {
  const details = document.createElement("details");
  details.className = "thoughts";
  details.open = true;
  const summary = document.createElement("summary");
  summary.textContent = "Thoughts";
  const body = document.createElement("div");
  body.className = "text";
  details.append(summary, body);
  article.prepend(details);
  return body;
}

async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function describe(begun, first, tokens, usage) {
  const figures = [];
  if (first) figures.push(`first token ${((first - begun) / 1000).toFixed(2)} s`);
  const seconds = usage ? usage.x_timings.total_s - usage.x_timings.first_token_s : (performance.now() - first) / 1000;
  if (first && tokens > 1 && seconds > 0) figures.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  figures.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
  if (usage && usage.prompt_tokens_details.cached_tokens) {
    figures.push(`${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} read from the cache`);
  }
  return figures.join(" · ");
}

async function answer(conversation) {
  const article = addMessage("assistant", "");
  article.classList.add("writing");
  const body = article.querySelector(".text");
  const figures = document.createElement("div");
  figures.className = "figures quiet";
  article.append(figures);
  const begun = performance.now();
  let text = "", thoughts = "", thinking = null, first = 0, tokens = 0, usage = null, isDrawn = true;
  const draw = () => {
    isDrawn = true;
    const isAtEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
    render(body, text);
    if (thinking) thinking.textContent = thoughts;
    if (tokens) figures.textContent = describe(begun, first, tokens, usage);
    if (isAtEnd) talk.scrollTop = talk.scrollHeight;
  };
  try {
    const response = await ask("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model: element("model").value || null, messages: conversation, stream: true, stream_options: { include_usage: true } }),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of readEvents(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) { usage = event.usage; tokens = usage.completion_tokens; }
      const delta = event.choices[0] && event.choices[0].delta;
      const piece = delta && (delta.content || ""), thought = delta && (delta.reasoning || "");
      if (piece || thought) {
        first = first || performance.now();
        tokens += 1;
        text += piece;
        thoughts += thought;
        if (thought && !thinking) thinking = addThoughts(article);
      }
      if (isDrawn) { isDrawn = false; requestAnimationFrame(draw); }
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      const line = document.createElement("div");
      line.className = "wrong";
      line.textContent = error.message;
      article.append(line);
    }
  }
  draw();
  article.classList.remove("writing");
  if (text) conversation.push({ role: "assistant", content: text });
  else conversation.pop();
}

async function submit() {
  const text = question.value.trim();
  if (!text || running) return;
  question.value = "";
  grow();
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  addMessage("user", parts.length ? `${text}\n[${countPictures()}]` : text);
  messages.push({ role: "user", content: parts.length ? [...parts, { type: "text", text }] : text });
  pictures = [];
  showStatus();
  running = new AbortController();
  send.hidden = true;
  stop.hidden = false;
  await answer(messages);
  running = null;
  send.hidden = false;
  stop.hidden = true;
  question.focus();
  showModels().catch(() => {});
}

function startAnew() {
  if (running) running.abort();
  messages = [];
  pictures = [];
  showStatus();
  talk.querySelectorAll("article").forEach((article) => article.remove());
  element("hint").hidden = false;
  question.focus();
}

function countPictures() {
  return `${pictures.length} ${pictures.length === 1 ? "image" : "images"}`;
}

function showStatus() {
  const help = "Enter sends, Shift+Enter breaks the line, Escape stops";
  element("status").textContent = pictures.length ? `${countPictures()} with the next message; New chat drops them` : help;
}

// Images that are dropped on the page or pasted; the server says which formats and models take them.
function takePictures(event, data) {
  const files = [...((data && data.files) || [])].filter((file) => file.type.startsWith("image/"));
  if (event.type !== "paste" || files.length) event.preventDefault();
  for (const file of files) {
    const reader = new FileReader();
    reader.addEventListener("load", () => { pictures.push(reader.result); showStatus(); });
    reader.readAsDataURL(file);
  }
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

element("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
element("new").addEventListener("click", startAnew);
stop.addEventListener("click", () => running && running.abort());
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => takePictures(event, event.dataTransfer));
document.addEventListener("paste", (event) => takePictures(event, event.clipboardData));
showStatus();
showModels().catch((error) => { element("status").textContent = `The server does not answer: ${error.message}`; });
setInterval(() => { if (!document.hidden && !element("lock").open) showModels().catch(() => {}); }, 10000);
