// The openai package for Node: chat, stream, a tool's round trip, and its errors.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const user = (content) => ({ role: "user", content });
const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } } } } }];

const chat = await client.chat.completions.create({ model: "base", messages: [user("SAY:ok")] });

let text = "";
let usage = null;
const events = await client.chat.completions.create({
  model: "base", messages: [user("SAY:a\u2028b ünd 😀")], stream: true, stream_options: { include_usage: true },
});
for await (const chunk of events) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}

const asked = [user('SAY:<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>')];
const first = (await client.chat.completions.create({ model: "base", messages: asked, tools })).choices[0];
const call = first.message.tool_calls[0];
const history = [...asked, first.message, { role: "tool", tool_call_id: call.id, content: "rain" }, user("SAY:wet")];
const second = await client.chat.completions.create({ model: "base", messages: history, tools });

const errors = {};
for (const [name, body] of Object.entries({
  model: { model: "nothing", messages: [user("x")] },
  context: { model: "base", messages: [user("x ".repeat(5000))] },
  field: { model: "base", messages: [user("x")], temperature: -1 },
})) {
  try {
    await client.chat.completions.create(body);
  } catch (error) {
    errors[name] = [error.constructor.name, error.code, error.param, error.message];
  }
}

const responses = (await client.responses.create({ model: "base", input: "SAY:ok" })).output_text;
const answers = {
  models: (await client.models.list()).data.map((model) => model.id),
  chat: chat.choices[0].message.content,
  responses,
  stream: { text, usage: usage.completion_tokens > 0 },
  tools: {
    finish: first.finish_reason,
    call: [call.function.name, JSON.parse(call.function.arguments)],
    answer: second.choices[0].message.content,
  },
  errors,
};
console.log(JSON.stringify(answers));
