"""litellm, which gateways and agents call models through: chat, stream, a tool's round trip, its errors."""

import json
import sys

import litellm


def complete(text: str, **more):
    messages = more.pop("messages", [{"role": "user", "content": text}])
    return litellm.completion(
        model="openai/" + more.pop("model", "base"),
        api_base=sys.argv[1] + "/v1",
        api_key="none",
        messages=messages,
        num_retries=0,
        max_retries=0,
        **more,
    )


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def tools() -> dict:
    asked = {
        "role": "user",
        "content": 'SAY:<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
    }
    first = complete("", messages=[asked], tools=[WEATHER]).choices[0]
    call = first.message.tool_calls[0]
    history = [
        asked,
        first.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "rain"},
        {"role": "user", "content": "SAY:wet"},
    ]
    second = complete("", messages=history, tools=[WEATHER]).choices[0]
    return {
        "finish": first.finish_reason,
        "call": [call.function.name, json.loads(call.function.arguments)],
        "answer": second.message.content,
    }


def errors() -> dict:
    found = {}
    for name, more in {"model": {"model": "nothing"}, "context": {"text": "x " * 5000}}.items():
        try:
            complete(**{"text": "x", **more})
        except Exception as error:
            found[name] = type(error).__name__
    return found


answers = {
    "chat": complete("SAY:ok").choices[0].message.content,
    "stream": {
        "text": "".join(
            c.choices[0].delta.content or "" for c in complete("SAY:a\u2028b ünd 😀", stream=True)
        )
    },
    "tools": tools(),
    "errors": errors(),
}
print(json.dumps(answers))
