// The list of conversations: beside the talk where there is room, over it where there is not.

import {$, button, element, notice} from "./dom.js";
import {keepSetting, lasting, list, remove, restore, save, setting} from "./store.js";

const wide = matchMedia("(min-width: 60rem)");
const drawer = $("chats");

function show(on) {
  drawer.close();
  if (on) {
    if (wide.matches) drawer.open = true;  // show() would take the focus
    else drawer.showModal();
  }
  $("list").setAttribute("aria-expanded", on);
}

function renamed(chat, place, done) {
  const field = element("input");
  let left = false;
  field.value = chat.title;
  field.maxLength = 100;
  field.setAttribute("aria-label", "Name of the chat");
  const leave = keep => {
    if (left) return;
    left = true;
    if (keep && field.value.trim()) chat.title = field.value.trim();
    done(keep);
  };
  field.addEventListener("keydown", event => {
    if (event.key === "Enter") leave(true);
    if (event.key === "Escape") { event.preventDefault(); event.stopPropagation(); leave(false); }
  });
  field.addEventListener("blur", () => leave(true));
  place.replaceWith(field);
  field.select();
}

// acts: {open(chat), fresh(), exported(kind)}
export class List {
  constructor(acts) {
    this.acts = acts;
    $("list").addEventListener("click", () => {
      show(!drawer.open);
      if (wide.matches) keepSetting("chat-list", drawer.open);
    });
    drawer.addEventListener("close", () => $("list").setAttribute("aria-expanded", drawer.open));
    drawer.addEventListener("click", event => { if (event.target === drawer && !wide.matches) show(false); });
    const fit = () => show(wide.matches && (setting("chat-list") ?? true));
    wide.addEventListener("change", fit);
    fit();
    $("keeping").textContent = lasting()
      ? "Kept in this browser only; the oldest go after 100 chats or 2 million characters."
      : "This browser keeps nothing: chats end with this page.";
  }

  show(current) {
    const items = list().map(chat => this.#item(chat.id === current.id ? current : chat, current));
    $("chat-list").replaceChildren(...items);
  }

  #item(chat, current) {
    const name = button(chat.title || "Chat", () => {
      if (!wide.matches) show(false);
      this.acts.open(chat);
    });
    name.className = "name";
    name.dir = "auto";
    const made = element("li", "", name);
    if (chat !== current) return made;
    name.setAttribute("aria-current", "true");
    const rename = () => renamed(chat, name, keep => {
      if (keep) notice(save(chat));
      this.show(current);
    });
    made.append(element("div.acts", "", button("Rename", rename), button("JSON", () => this.acts.exported("json"), "Export as OpenAI's messages"),
      button("Markdown", () => this.acts.exported("md"), "Export as Markdown"), button("Delete", () => this.#delete(chat))));
    return made;
  }

  #delete(chat) {
    remove(chat);
    this.acts.fresh();
    notice(`Deleted “${chat.title}”.`, "Undo", () => {
      const words = restore(chat);
      this.acts.open(chat);
      if (words) notice(words);
    });
  }
}
