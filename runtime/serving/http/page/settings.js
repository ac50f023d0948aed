// The settings of requests, kept in the browser.

import {$} from "./dom.js";
import {keepSetting, setting} from "./store.js";

const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];
const ALL = [...NUMBERS, "system", "tools"];

export const system = () => $("system").value.trim();

// The functions that a model may call: a list as OpenAI's `tools`. Says what is wrong at their field.
function tools() {
  const field = $("tools"), text = field.value.trim();
  let made = [];
  field.setCustomValidity("");
  try { if (text) made = JSON.parse(text); } catch (error) { field.setCustomValidity(`This is no JSON: ${error.message}`); }
  if (!Array.isArray(made)) field.setCustomValidity('Functions are a list: [{"type": "function", "function": {"name": …}}]');
  return made;
}

// What a request says besides its messages; null where a field must be mended first, which is then shown.
export function asked() {
  const made = {stream: true, stream_options: {include_usage: true}}, functions = tools();
  if (!$("settings").checkValidity()) {
    open(true);
    $("settings").reportValidity();
    return null;
  }
  for (const name of NUMBERS) if ($(name).value !== "") made[name] = Number($(name).value);
  if (functions.length) made.tools = functions;
  return made;
}

export function open(on) {
  $("settings").hidden = !on;
  $("more").setAttribute("aria-expanded", on);
}

export function start() {
  const kept = setting("chat-settings") ?? {};
  for (const name of ALL) $(name).value = kept[name] ?? "";
  $("settings").addEventListener("change", () => keepSetting("chat-settings", Object.fromEntries(ALL.map(name => [name, $(name).value]))));
  $("settings").addEventListener("submit", event => event.preventDefault());
  $("more").addEventListener("click", () => open($("settings").hidden));
}
