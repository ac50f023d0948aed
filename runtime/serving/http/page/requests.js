// What goes to the server and what comes back: messages, requests, events.

import {at} from "./dom.js";

// What a model is told that a turn was answered: its own words, else another's.
export const answerOf = (turn, model) => turn.answers[authorOf(turn, model)];

export const authorOf = (turn, model) => Object.hasOwn(turn.answers, model) ? model : Object.keys(turn.answers)[0];

// A conversation as OpenAI's messages, as `model` sees it; turns without an answer are left out.
export function messages(turns, model, system = "") {
  const made = system ? [{role: "system", content: system}] : [];
  for (const turn of turns) {
    const answer = answerOf(turn, model);
    if (!answer || !(answer.content || answer.calls.length)) continue;
    if (turn.question !== null) made.push({role: "user", content: turn.question});
    const said = {role: "assistant", content: answer.content || null};
    if (answer.calls.length) said.tool_calls = answer.calls.map(call => (
      {id: call.id, type: "function", function: {name: call.name, arguments: call.arguments}}));
    made.push(said, ...answer.calls.map(call => ({role: "tool", tool_call_id: call.id, content: call.result ?? ""})));
  }
  return made;
}

export const newAnswer = () => ({content: "", reasoning: "", calls: [], note: "", failed: false});

async function failure(reply) {
  const body = await reply.json().catch(() => ({}));
  const message = body.error?.message || `the server answered ${reply.status}`;
  const help = {401: " Load the page again to be asked for the key.", 429: " The server is busy, try again in a moment."}[reply.status] || "";
  return new Error(message + (help && !/[.!?]$/.test(message) ? "." : "") + help);
}

export async function modelNames() {
  const reply = await fetch(at("v1/models"));
  if (!reply.ok) throw await failure(reply);
  return (await reply.json()).data.map(model => model.id);
}

// Yields the events of a stream; a chunk may end anywhere, even within a character.
async function* events(reply) {
  const decoder = new TextDecoder(), reader = reply.body.getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    rest += decoder.decode(value || new Uint8Array(), {stream: !done});
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    if (done) return;
  }
}

function add(answer, delta) {
  answer.content += delta.content ?? "";
  answer.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
  for (const part of delta.tool_calls ?? []) {
    const call = answer.calls[part.index] ??= {id: "", name: "", arguments: ""};
    call.id ||= part.id ?? "";
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
}

function rate(count, began) {
  const seconds = (performance.now() - began) / 1000;
  return `${count} tokens` + (count > 1 && seconds > 0 ? `, ${((count - 1) / seconds).toFixed(1)} tokens/s` : "");
}

// Streams an answer into `answer`; calls `shown` whenever it has grown.
export async function stream(body, answer, signal, shown) {
  let count = 0, began = 0, ended = "", tokens = null, whole = false;
  const said = () => began ? rate(tokens ?? count, began) : "";
  const closed = word => { answer.note = [said(), word].filter(Boolean).join(", "); };
  try {
    const reply = await fetch(at("v1/chat/completions"), {
      method: "POST", signal, headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
    });
    if (!reply.ok) throw await failure(reply);
    for await (const data of events(reply)) {
      if (data === "[DONE]") { whole = true; break; }
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      ended = choice.finish_reason || ended;
      add(answer, choice.delta);
      if (!(choice.delta.content || choice.delta.reasoning_content || choice.delta.tool_calls)) continue;
      began ||= performance.now();
      count += 1;
      answer.note = said();
      shown();
    }
    if (!whole) throw new TypeError("the stream has no end");
    closed(ended === "length" ? "cut at the limit" : "");
  } catch (error) {
    if (signal.aborted) return closed("stopped");
    answer.failed = true;
    const lost = began ? "the connection to the server broke off, the answer is not whole" : "the server cannot be reached";
    closed(error instanceof TypeError ? lost : error.message);
  }
}
