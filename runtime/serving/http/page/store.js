// Conversations in the browser's storage, each below a key of its own, so that tabs do not overwrite each other's.
// Bounded: the oldest go. Never holds a key: the browser itself keeps the one it was asked for.

const PREFIX = "chat:";
const MOST_CHATS = 100;
const MOST_CHARACTERS = 2_000_000;  // of the five million or so that a browser gives a site

let storage = null;
try {
  if (localStorage.length >= 0) storage = localStorage;
} catch { /* forbidden: see `lasting` */ }

export const lasting = () => storage !== null;

export function setting(name) {
  try { return JSON.parse(storage?.getItem(name) ?? "null"); } catch { return null; }
}

export function keepSetting(name, value) {
  try { storage?.setItem(name, JSON.stringify(value)); } catch { /* full: it holds until the page is closed */ }
}

export const newChat = () => ({id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", turns: [], saved: 0});

const isText = it => typeof it === "string";
const isAnswer = it => isText(it?.content) && isText(it.reasoning) && isText(it.note) && Array.isArray(it.calls)
  && it.calls.every(call => isText(call?.name) && isText(call.arguments) && isText(call.id));
const isTurn = it => (isText(it?.question) || it?.question === null) && it.answers instanceof Object && Object.values(it.answers).every(isAnswer);

function parsed(text) {
  try {
    const chat = JSON.parse(text);
    return isText(chat.id) && isText(chat.title) && Number.isFinite(chat.saved) && Array.isArray(chat.turns) && chat.turns.every(isTurn) ? chat : null;
  } catch { return null; }
}

export function load(id) {
  const text = storage?.getItem(PREFIX + id);
  return text ? parsed(text) : null;
}

// Newest first; what cannot be read is left out, and goes when room is needed.
function kept() {
  const found = [];
  for (let i = 0; storage && i < storage.length; i++) {
    const key = storage.key(i);
    if (!key.startsWith(PREFIX)) continue;
    const text = storage.getItem(key) ?? "", chat = parsed(text);
    found.push({key, chat, size: text.length, saved: chat?.saved ?? 0});
  }
  return found.sort((a, b) => b.saved - a.saved);
}

export const list = () => kept().filter(it => it.chat).map(it => it.chat);

const removed = new Set();  // ids: an answer to a chat may still come

export function remove(chat) {
  removed.add(chat.id);
  storage?.removeItem(PREFIX + chat.id);
}

export function restore(chat) {
  removed.delete(chat.id);
  return save(chat);
}

// Keeps a chat. Returns words for the user where something had to give way, else "".
export function save(chat) {
  if (!storage || !chat.turns.length || removed.has(chat.id)) return "";
  let words = "";
  const other = load(chat.id);
  if (other && other.saved !== chat.saved) {  // another tab went on with it: both courses stay
    chat.id = newChat().id;
    words = "This chat went on in another tab; what is here is kept as a chat of its own.";
  }
  chat.saved = Math.max(Date.now(), chat.saved + 1);
  const text = JSON.stringify(chat), others = kept().filter(it => it.key !== PREFIX + chat.id);
  if (text.length > MOST_CHARACTERS) return "This chat is too long to be kept in the browser; export it to keep it.";
  let size = text.length + others.reduce((sum, it) => sum + it.size, 0);
  const drop = () => {
    const oldest = others.pop();
    storage.removeItem(oldest.key);
    size -= oldest.size;
    words = "The oldest chat was removed from this browser to make room.";
  };
  while (others.length >= MOST_CHATS || size > MOST_CHARACTERS) drop();
  for (;;) {
    try {
      storage.setItem(PREFIX + chat.id, text);
      return words;
    } catch {
      if (!others.length) return "This chat could not be kept: the browser's storage is full. Export it to keep it.";
      drop();
    }
  }
}

// Calls `changed(id)` when another tab has kept or removed a chat.
export function watch(changed) {
  addEventListener("storage", event => {
    if (event.key === null) changed(null);
    else if (event.key.startsWith(PREFIX)) changed(event.key.slice(PREFIX.length));
  });
}
