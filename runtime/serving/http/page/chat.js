// The chat page. Reads /v1/models, streams /v1/chat/completions. Start at `send`.

import {$, notice} from "./dom.js";
import {Column, editor} from "./columns.js";
import {asJson, asMarkdown, download} from "./exports.js";
import {List} from "./list.js";
import {messages, modelNames, newAnswer, stream} from "./requests.js";
import * as settings from "./settings.js";
import {load, newChat, save, watch} from "./store.js";

let chat = newChat();
let running = null;   // AbortController of the answers in progress
let comparing = false;

const acts = {edit, regenerate, answerWith};
const left = new Column("left", acts), right = new Column("right", acts);
const columns = () => comparing ? [left, right] : [left];
const chats = new List({open, fresh, exported});

function keep(kept) {
  const words = save(kept);
  if (words) notice(words);
  chats.show(chat);
}

function show(models = []) {
  for (const column of columns()) column.show(chat, models);
  $("empty").hidden = chat.turns.length > 0;
  chats.show(chat);
}

async function loadModels() {
  const names = await modelNames();
  for (const [select, wanted] of [[left.select, 0], [right.select, 1]]) {
    const chosen = select.value;
    if (String(names) !== String([...select.options].map(option => option.value)))
      select.replaceChildren(...names.map(name => new Option(name, name)));
    select.value = names.includes(chosen) ? chosen : names[Math.min(wanted, names.length - 1)];
  }
  $("compare").hidden = names.length < 2;
  const adapters = names.length === 2 ? ` or ${names[1]}` : names.length > 2 ? ` or one of ${names.length - 1} adapters` : "";
  $("who").textContent = `Ask ${names[0]}${adapters}.`;
}

async function untilLoaded() {
  for (;;) {
    try { return await loadModels(); }
    catch (error) { $("who").textContent = error instanceof TypeError ? "The server cannot be reached." : error.message; }
    await new Promise(resolve => setTimeout(resolve, 1500));
  }
}

// The settings for a request that can be sent now, else null.
function ready() {
  if (running) notice("An answer is under way: wait for it or stop it.");
  return running || !left.model ? null : settings.asked();
}

// What is shown must stay while answers come into it.
function busy(control) {
  running = control;
  $("go").textContent = running ? "Stop" : "Send";
  for (const it of [left.select, right.select, $("compare")]) it.disabled = running !== null;
}

// Lets each of `models` answer the last turn of the chat, which is on the page.
async function answered(models, options) {
  const mine = chat, turn = chat.turns.at(-1), control = new AbortController(), {signal} = control;
  busy(control);
  keep(mine);
  await Promise.all(models.map(async model => {
    const cards = columns().filter(column => column.model === model).map(column => column.last);
    const body = {model, messages: messages(mine.turns.slice(0, -1), model, settings.system()), ...options};
    if (turn.question !== null) body.messages.push({role: "user", content: turn.question});
    await stream(body, turn.answers[model], signal, () => cards.forEach(card => card.grow()));
    cards.forEach(card => card.finish(true));
  }));
  busy(null);
  $("announcement").textContent = models.map(model => said(turn.answers[model])).join("\n");
  keep(mine);
}

const said = answer => [answer.content, ...answer.calls.map(call => `Call: ${call.name}`), answer.failed ? answer.note : ""].join("\n").trim();

// Adds a turn; `question` is null where the results of calls go on by themselves.
function ask(question, options, models = [...new Set(columns().map(column => column.model))]) {
  notice("");
  chat.title ||= (question ?? "").split("\n")[0].slice(0, 60);
  chat.turns.push({question, answers: Object.fromEntries(models.map(model => [model, newAnswer()]))});
  for (const column of columns()) column.extend(chat, models);
  $("empty").hidden = true;
  return answered(models, options);
}

function send() {
  const question = $("prompt").value.trim(), options = question && ready();
  if (!options) return;
  $("prompt").value = "";
  fit();
  ask(question, options);
}

function stop() { running?.abort(); }

function edit(index, place) {
  editor(place, chat.turns[index].question, text => {
    const options = ready(), followed = index < chat.turns.length - 1;
    if (!options) return;
    if (followed) chat = {...newChat(), title: `${chat.title} (edited)`.slice(0, 100), turns: structuredClone(chat.turns)};
    chat.turns.splice(index);
    show();
    ask(text, options);
    if (followed) notice("What followed before stays in the list of chats.");
  });
}

function regenerate(model) {
  const options = ready();
  if (!options) return;
  chat.turns.at(-1).answers[model] = newAnswer();
  notice("");
  show([model]);
  answered([model], options);
}

function answerWith(model) {
  const options = ready();
  if (options) ask(null, options, [model]);
}

function open(other) {
  stop();
  chat = other;
  notice("");
  show();
  $("prompt").focus();
}

function fresh() { open(newChat()); }

function exported(kind) {
  const models = [...new Set(columns().map(column => column.model))];
  if (kind === "json") download(`${chat.title}.json`, "application/json", asJson(chat, models, settings.system()));
  else download(`${chat.title}.md`, "text/markdown", asMarkdown(chat, models));
}

function fit() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = $("prompt").scrollHeight + 2 + "px";
}

function compare(on) {
  comparing = on;
  $("compare").setAttribute("aria-pressed", on);
  document.body.classList.toggle("comparing", on);
  right.box.hidden = !on;
  (on ? left.box.querySelector(".head") : $("single")).append(left.select);
  show();
}

$("ask").addEventListener("submit", event => { event.preventDefault(); running ? stop() : send(); });
$("prompt").addEventListener("input", fit);
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") stop();
  if (event.altKey && event.code === "KeyN") { event.preventDefault(); fresh(); }
});
$("compare").addEventListener("click", () => compare(!comparing));
$("fresh").addEventListener("click", fresh);
for (const column of [left, right]) column.select.addEventListener("change", () => show());
left.select.addEventListener("focus", () => { loadModels().catch(() => {}); });
addEventListener("pagehide", () => { if (running) save(chat); });
watch(id => {
  const other = !running && id === chat.id && load(id);
  if (other) {
    chat = other;
    show();
  } else chats.show(chat);
});
settings.start();
show();
untilLoaded();
