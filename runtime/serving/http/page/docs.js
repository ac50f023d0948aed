// fetch takes no address with a password, as one relative to the page may be.
const at = path => location.origin + location.pathname.replace(/[^/]*$/, "") + path.replace(/^\//, "");
let api;
function element(tag, text, ...children) {
  const [name, kind] = tag.split(".");
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}
// What stands between backticks is code.
const prose = text => (text || "").split("`").map((part, at) => at % 2 ? element("code", part) : part);
const GROUPS = {chat: "Chat", openai: "OpenAI's routes", anthropic: "Anthropic's routes", tools: "Tokens and adapters", health: "Health, metrics, pages"};
const typeName = ref => ref.split("/").pop();
const variants = field => (field.anyOf || field.oneOf || [field]).filter(it => it.type !== "null");
function kind(field) {
  if (field.$ref) return typeName(field.$ref);
  if (field.anyOf || field.oneOf) return [...new Set(variants(field).map(kind))].join(" or ");
  if (field.enum) return field.enum.map(it => JSON.stringify(it)).join(" or ");
  if (field.const !== undefined) return JSON.stringify(field.const);
  if (field.type === "array") return "list of " + kind(field.items || {});
  return {string: "text", integer: "whole number", number: "number", boolean: "true or false", object: "object"}[field.type] || "anything";
}
const BOUNDS = [["minimum", "maximum", ""], ["minItems", "maxItems", " entries"], ["minLength", "maxLength", " characters"]];
const shown = number => number.toLocaleString("en", {maximumSignificantDigits: 15});
function limits(field) {
  const said = [];
  for (const it of variants(field)) {
    for (const [least, most, unit] of BOUNDS) {
      if (it[least] !== undefined && it[most] !== undefined) said.push(`${shown(it[least])} to ${shown(it[most])}${unit}`);
      else if (it[least] !== undefined) said.push(`at least ${shown(it[least])}${unit}`);
      else if (it[most] !== undefined) said.push(`at most ${shown(it[most])}${unit}`);
    }
    if (it.exclusiveMinimum !== undefined) said.push(`above ${shown(it.exclusiveMinimum)}`);
    if (it.exclusiveMaximum !== undefined) said.push(`below ${shown(it.exclusiveMaximum)}`);
    if (it.pattern) said.push(`pattern ${it.pattern}`);
    if (it.anyOf || it.oneOf) said.push(...limits(it));
  }
  return [...new Set(said)];
}
function used(field, found = new Set()) {
  if (field.$ref) found.add(typeName(field.$ref));
  for (const it of [...(field.anyOf || field.oneOf || []), ...(field.items ? [field.items] : [])]) used(it, found);
  return found;
}
function fields(schema, example, seen) {
  const required = new Set(schema.required || []);
  const rank = name => required.has(name) ? 0 : name in (example || {}) ? 1 : 2;
  const names = Object.keys(schema.properties || {}).sort((a, b) => rank(a) - rank(b));
  const below = new Set();
  const rows = names.map(name => {
    const field = schema.properties[name], about = [];
    if (field.default !== undefined && field.default !== null) about.push(`default ${JSON.stringify(field.default)}`);
    about.push(...limits(field));
    used(field, below);
    const first = element("td", name);
    if (required.has(name)) first.append(element("span.required", "required"));
    return element("tr", "", first, element("td", kind(field)),
      element("td", "", ...prose(field.description), ...(about.length ? [element("div.status", about.join(" · "))] : [])));
  });
  const made = [element("table.fields", "", element("tbody", "", ...rows))];
  for (const name of below) if (!seen.includes(name)) {
    const inner = api.components.schemas[name];
    if (!inner?.properties) continue;
    const box = element("details", "", element("summary", name));
    const fill = () => { if (box.children.length === 1) box.append(...fields(inner, null, [...seen, name])); };
    box.addEventListener("toggle", fill);
    made.push(box);
  }
  return made;
}
function examples(samples) {
  const code = element("pre"), row = element("div.row");
  const buttons = samples.map(sample => {
    const button = element("button", sample.label);
    button.type = "button";
    button.onclick = () => {
      code.textContent = sample.source.replaceAll("http://localhost:8080", at("").replace(/\/$/, ""));
      buttons.forEach(it => it.setAttribute("aria-pressed", it === button));
    };
    return button;
  });
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.onclick = async () => { await navigator.clipboard.writeText(code.textContent); copy.textContent = "Copied"; };
  row.append(...buttons, copy);
  buttons[0].click();
  return [element("h3", "Example"), row, code];
}
const SHOWN = ["content-type", "x-request-id", "retry-after", "x-ignored-fields", "x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens"];
function tryIt(method, path, body) {
  const address = element("input"), text = element("textarea"), go = element("button", "Send");
  const status = element("p.status"), answer = element("pre");
  address.value = path.replace(/\{.*?\}/, "base");
  address.setAttribute("aria-label", "Path");
  text.value = body ? JSON.stringify(body, null, 2) : "";
  text.setAttribute("aria-label", "Body");
  text.spellcheck = false;
  go.type = "button";
  answer.hidden = true;
  status.setAttribute("role", "status");
  let running = null;
  go.onclick = async () => {
    if (running) return running.abort();
    running = new AbortController();
    go.textContent = "Stop";
    status.className = "status";
    status.textContent = "…";
    answer.hidden = true;
    const began = performance.now(), headers = {}, key = document.getElementById("key").value;
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body) headers["Content-Type"] = "application/json";
    try {
      const reply = await fetch(at(address.value), {method: method.toUpperCase(), headers, body: body ? text.value : undefined, signal: running.signal});
      const said = SHOWN.filter(name => reply.headers.has(name)).map(name => `${name}: ${reply.headers.get(name)}`);
      const head = () => `${reply.status} in ${((performance.now() - began) / 1000).toFixed(2)} s · ${said.join(" · ")}`;
      if (!reply.ok) status.className = "status bad";
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      let whole = "";
      answer.hidden = false;
      for (let part; !(part = await reader.read()).done;) {
        answer.textContent = whole += part.value;
        status.textContent = head();
      }
      status.textContent = head();
      try { answer.textContent = JSON.stringify(JSON.parse(whole), null, 2); } catch { /* no JSON: as it came */ }
    } catch (failure) {
      status.className = "status bad";
      status.textContent = failure.name === "AbortError" ? "stopped" : `no answer: ${failure.message}`;
    }
    running = null;
    go.textContent = "Send";
  };
  const parts = [element("h3", "Try it")];
  if (path.includes("{")) parts.push(address);
  if (body) parts.push(text);
  return [...parts, element("div.row", "", go), status, answer];
}
function errors(responses) {
  const rows = Object.entries(responses).filter(([status]) => /^[45]\d\d$/.test(status)).map(([status, it]) =>
    element("tr", "", element("td", status), element("td", "", ...prose(it.description))));
  if (!rows.length) return [];
  const table = element("table.fields", "", element("tbody", "", ...rows));
  return [element("h3", "Errors"), table];
}
function fill(box, method, path, operation) {
  const sent = operation.requestBody?.content?.["application/json"];
  box.append(element("p", "", ...prose(operation.description)));
  if (sent?.schema?.$ref) {
    const schema = api.components.schemas[typeName(sent.schema.$ref)];
    box.append(element("h3", "Fields"), ...fields(schema, sent.example, [typeName(sent.schema.$ref)]));
  }
  if (operation["x-codeSamples"]) box.append(...examples(operation["x-codeSamples"]));
  for (const [type, content] of Object.entries(operation.responses["200"]?.content || {})) {
    const heading = element("h3", "Answer ");
    heading.append(element("small", type));
    const example = content.example;
    box.append(heading);
    if (example !== undefined) box.append(element("pre", typeof example === "string" ? example : JSON.stringify(example, null, 2)));
    else if (type === "text/event-stream") box.append(element("p.status", "with \"stream\": true, one event for each piece"));
  }
  box.append(...errors(operation.responses), ...tryIt(method, path, sent ? sent.example || {} : null));
}
(async () => {
  api = await (await fetch(at("openapi.json"))).json();
  document.getElementById("title").textContent = `${api.info.title} ${api.info.version}`;
  document.getElementById("about").replaceChildren(...prose(api.info.description));
  const groups = new Map();
  for (const [path, methods] of Object.entries(api.paths)) for (const [method, operation] of Object.entries(methods)) {
    const box = element("details", "", element("summary", "",
      element("b", method.toUpperCase()), element("code", path), element("span", operation.summary || "")));
    box.addEventListener("toggle", () => { if (box.children.length === 1) fill(box, method, path, operation); });
    const group = (operation.tags || ["other"])[0];
    if (!groups.has(group)) groups.set(group, element("section", "", element("h2", GROUPS[group] || group)));
    groups.get(group).append(box);
  }
  document.getElementById("routes").replaceChildren(...groups.values());
})().catch(failure => { document.getElementById("routes").textContent = `openapi.json cannot be read: ${failure.message}`; });
