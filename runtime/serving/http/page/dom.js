// Small helpers that every part of the page uses.

export const $ = id => document.getElementById(id);

// fetch takes no address with a password, as one relative to the page may be.
export const at = path => location.origin + location.pathname.replace(/[^/]*$/, "") + path;

// element("div.code", "text", child, ...): text is never read as HTML.
export function element(name, text = "", ...children) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

export function button(label, act, title = "") {
  const made = element("button", label);
  made.type = "button";
  if (title) made.title = title;
  made.addEventListener("click", act);
  return made;
}

export function copyButton(text) {
  const made = button("Copy", async () => {
    await copied(text());
    made.textContent = "Copied";
    setTimeout(() => { made.textContent = "Copy"; }, 1200);
  });
  return made;
}

// The clipboard needs HTTPS or localhost; a pod's address is neither.
async function copied(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.body.appendChild(element("textarea.quiet"));
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
}

// Control characters, which would be invisible or worse, become U+FFFD.
export const visible = text => text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f]/g, "\ufffd");

// Says something below the talk, to screen readers too, with one thing to do about it.
export function notice(words, label = "", act = null) {
  const place = $("notice");
  place.replaceChildren(element("span", words));
  if (act) place.append(button(label, () => { place.replaceChildren(); act(); }));
  if (words) place.append(button("Dismiss", () => place.replaceChildren()));
  else place.replaceChildren();
}
