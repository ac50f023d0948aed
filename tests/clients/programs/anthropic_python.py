"""The anthropic package: a message, a stream, a tool's loop streamed, a count of tokens, and its errors."""

import json
import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def ask(messages: list, **more: object) -> anthropic.types.Message:
    return client.messages.create(model="base", max_tokens=200, messages=messages, **more)


def streamed(messages: list, **more: object) -> tuple[str, anthropic.types.Message]:
    with client.messages.stream(model="base", max_tokens=200, messages=messages, **more) as stream:
        text = "".join(stream.text_stream)
        return text, stream.get_final_message()


def tools() -> dict:
    """Three turns: two calls, each with its result, and an answer."""
    messages: list = [user('SAY:<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>')]
    called = []
    for said in (
        'SAY:<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>',
        "SAY:wet",
    ):
        _, message = streamed(messages, tools=[WEATHER])
        (call,) = (block for block in message.content if block.type == "tool_use")
        called.append([call.name, call.input, message.stop_reason])
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
        messages += [message.to_param(), user([result, {"type": "text", "text": said}])]
    return {"called": called, "answer": ask(messages, tools=[WEATHER]).content[0].text}


def errors() -> dict:
    found = {}
    for name, body in {
        "model": {"model": "nothing", "messages": [user("x")]},
        "context": {"model": "base", "messages": [user("x " * 5000)]},
        "field": {"model": "base", "messages": [user("x")], "extra_body": {"temperature": -1}},
    }.items():
        try:
            client.messages.create(max_tokens=5, **body)
        except anthropic.APIStatusError as error:
            found[name] = [type(error).__name__, error.body["error"]["type"]]
    return found


text, message = streamed([user("SAY:a\u2028b ünd 😀")], system="be brief")
answers = {
    "message": ask([user("SAY:ok")]).content[0].text,
    "stream": [text, message.stop_reason, message.usage.output_tokens > 0],
    "count": client.messages.count_tokens(model="base", messages=[user("SAY:ok")]).input_tokens > 0,
    "tools": tools(),
    "errors": errors(),
}
print(json.dumps(answers))
