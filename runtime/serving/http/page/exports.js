// A conversation as a file: OpenAI's messages as JSON, or Markdown to read.

import {element} from "./dom.js";
import {answerOf, authorOf, messages} from "./requests.js";

export function asJson(chat, models, system) {
  const each = models.map(model => ({model, messages: messages(chat.turns, model, system)}));
  return JSON.stringify(each.length === 1 ? each[0] : each, null, 2) + "\n";
}

const fenced = (text, language) => {
  const fence = "`".repeat(Math.max(3, ...[...text.matchAll(/`+/g)].map(run => run[0].length + 1)));
  return `${fence}${language}\n${text}\n${fence}`;
};

function answerText(answer) {
  const parts = [];
  if (answer.reasoning) parts.push(answer.reasoning.trim().replace(/^/gm, "> "));
  if (answer.content) parts.push(answer.content.trim());
  for (const call of answer.calls) {
    parts.push(`Call of \`${call.name}\`:`, fenced(call.arguments, "json"));
    if (call.result !== undefined) parts.push("Result:", fenced(call.result, ""));
  }
  return parts.join("\n\n");
}

export function asMarkdown(chat, models) {
  const parts = [`# ${chat.title || "Chat"}`];
  for (const turn of chat.turns) {
    if (turn.question !== null) parts.push("## You", turn.question);
    const authors = new Set(models.map(model => authorOf(turn, model)).filter(Boolean));
    for (const author of authors) parts.push(`## ${author}`, answerText(answerOf(turn, author)));
  }
  return parts.join("\n\n") + "\n";
}

export function download(name, type, text) {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], {type}));
  link.download = name.replace(/[^\p{L}\p{N}._-]+/gu, "-").slice(0, 60);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
