// Markdown as nodes. marked reads the text into tokens; the nodes are made of them here, one by one, so no HTML is
// ever read: tags in an answer are shown as text, images as links, and only links that a browser may follow safely.

import {Lexer} from "./marked/marked.esm.js";
import {copyButton, element, visible} from "./dom.js";

const DEEPEST = 12;      // lists in quotes in lists; what lies deeper is text
const LONGEST = 20_000;  // characters of one paragraph that are searched for emphasis and links

class Reader extends Lexer {
  depth = 0;

  deeper(read, src, tokens) {
    if (this.depth >= DEEPEST) {
      tokens.push({type: "text", raw: src, text: src});
      return tokens;
    }
    this.depth += 1;
    try { return read(); } finally { this.depth -= 1; }
  }

  blockTokens(src, tokens = [], last) {
    return this.deeper(() => super.blockTokens(src, tokens, last), src, tokens);
  }

  inlineTokens(src, tokens = []) {
    return this.deeper(() => super.inlineTokens(src, tokens), src, tokens);
  }

  inline(src, tokens = []) {
    return src.length > LONGEST ? tokens : super.inline(src, tokens);
  }
}

const ENTITIES = {amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", hellip: "…", mdash: "—", ndash: "–"};

const plain = text => visible(text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w{2,6}));/gi, (whole, decimal, hex, name) => {
  if (name) return ENTITIES[name] ?? whole;
  const code = decimal ? Number(decimal) : parseInt(hex, 16);
  return code && code <= 0x10ffff ? String.fromCodePoint(code) : "\ufffd";
}));

// Marks that turn the order of characters around make code read as what it is not: they are named.
const unturned = text => visible(text).replace(/[\u202a-\u202e\u2066-\u2069]/g, mark => `[U+${mark.charCodeAt(0).toString(16).toUpperCase()}]`);

function address(href) {
  try {
    const url = new URL(href);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch { return null; }
}

function link(href, children) {
  const url = address(href);
  if (!url) return element("span", "", ...children);
  const made = element("a", "", ...children);
  Object.assign(made, {href: url, target: "_blank", rel: "noopener noreferrer nofollow", title: url});
  return made;
}

function code(token) {
  const language = (token.lang || "").match(/^\S*/)[0].slice(0, 30);
  const text = element("pre", "", element("code", unturned(token.text)));
  text.tabIndex = 0;
  text.dir = "ltr";
  return element("div.code", "", element("div.bar", "", element("span", visible(language) || "text"), copyButton(() => token.text)), text);
}

function table(token) {
  const row = (cells, tag) => element("tr", "", ...cells.map((cell, i) => {
    const made = element(tag, "", ...nodes(cell.tokens));
    if (token.align[i]) made.style.textAlign = token.align[i];
    return made;
  }));
  const made = element("div.table", "", element("table", "",
    element("thead", "", row(token.header, "th")), element("tbody", "", ...token.rows.map(cells => row(cells, "td")))));
  made.tabIndex = 0;
  return made;
}

function list(token) {
  const items = token.items.map(item => element("li", "", ...(item.task && !item.tokens.some(is => is.type === "checkbox")
    ? [item.checked ? "☑ " : "☐ "] : []), ...nodes(item.tokens)));
  const made = element(token.ordered ? "ol" : "ul", "", ...items);
  if (token.ordered && token.start !== 1) made.start = token.start;
  return made;
}

const within = name => token => element(name, "", ...(token.tokens?.length ? nodes(token.tokens) : [plain(token.text)]));

const MADE = {
  paragraph: within("p"), blockquote: within("blockquote"), strong: within("strong"), em: within("em"), del: within("del"),
  heading: token => element("p", "", within("strong")(token)),  // within a list or a quote; else see `block`
  text: token => token.tokens?.length ? nodes(token.tokens) : plain(token.text),
  html: token => token.block ? element("p", visible(token.text.trimEnd())) : visible(token.text),
  codespan: token => element("code", unturned(token.text)),
  link: token => link(token.href, nodes(token.tokens)),
  image: token => link(token.href, ["🖼 " + (plain(token.text) || "image")]),
  checkbox: token => token.checked ? "☑ " : "☐ ",
  br: () => element("br"), hr: () => element("hr"), space: () => [], def: () => [],
  code, table, list,
};

// A token of the outermost level as nodes. Headings begin below the author's, and step down one by one.
function block(token, level) {
  const made = token.type === "heading" ? within("h" + level)(token) : MADE[token.type]?.(token) ?? visible(token.raw);
  return [made].flat().map(node => {
    const shown = typeof node === "string" ? element("p", node) : node;
    shown.dir = "auto";
    return shown;
  });
}

const nodes = tokens => tokens.flatMap(token => MADE[token.type]?.(token) ?? visible(token.raw));

function read(text) {
  const reader = new Reader({gfm: true, breaks: true});
  try {
    return {tokens: reader.lex(text), named: Object.keys(reader.tokens.links).length > 0};
  } catch {  // too much for the library: shown as it came
    return {tokens: [{type: "html", block: true, raw: text, text}], named: false};
  }
}

// One text in one place, shown anew as it grows. Blocks before the last two cannot change any more: they are neither
// read again nor touched, until `whole`, once, reads all (a link may be defined at the end).
export class Markdown {
  blocks = [];  // {at, raw, nodes, level}

  constructor(place) { this.place = place; }

  #level() { return this.blocks.findLast(known => known.level)?.level ?? 2; }

  show(given, whole = false) {
    const text = given.replace(/\r\n?/g, "\n");
    const kept = whole ? 0 : Math.max(0, this.blocks.length - 2);
    let from = this.blocks[kept]?.at ?? 0;
    const {tokens, named} = read(text.slice(from));
    const old = this.blocks.splice(kept);
    for (const token of tokens) {
      const at = from, known = named && whole ? undefined : old[0];
      from += token.raw.length;
      if (token.type === "space") continue;
      if (known?.raw === token.raw && known.at === at) this.blocks.push(old.shift());
      else {
        for (const gone of old.splice(0)) gone.nodes.forEach(node => node.remove());
        const level = token.type === "heading" ? Math.min(token.depth + 2, this.#level() + 1) : 0, made = block(token, level);
        this.place.append(...made);
        this.blocks.push({at, raw: token.raw, nodes: made, level});
      }
    }
    for (const gone of old) gone.nodes.forEach(node => node.remove());
  }
}
