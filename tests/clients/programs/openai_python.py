"""The openai package: chat, stream, structured output, a tool's round trip, and its errors."""

import json
import sys

import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)


class City(BaseModel):
    """What the structured answer is."""

    name: str
    people: int


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def ask(messages: list, **more) -> openai.types.chat.chat_completion.Choice:
    return client.chat.completions.create(model="base", messages=messages, **more).choices[0]


def streamed() -> dict:
    with client.chat.completions.create(
        model="base",
        messages=[user("SAY:a\u2028b ünd 😀")],
        stream=True,
        stream_options={"include_usage": True},
    ) as events:
        chunks = list(events)
    return {
        "text": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "usage": chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0,
    }


def tools() -> dict:
    messages = [user('SAY:<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>')]
    first = client.chat.completions.create(model="base", messages=messages, tools=[WEATHER]).choices[0]
    call = first.message.tool_calls[0]
    history = [
        *messages,
        first.message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        user("SAY:wet"),
    ]
    second = client.chat.completions.create(model="base", messages=history, tools=[WEATHER]).choices[0]
    return {
        "finish": first.finish_reason,
        "call": [call.function.name, json.loads(call.function.arguments)],
        "answer": second.message.content,
    }


def agent() -> dict:
    """Three turns of the route for agents, streamed: a call, another, and an answer."""
    tool = {"type": "function", "strict": False, **WEATHER["function"]}
    items: list = [user('SAY:<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>')]
    called = []
    for said in ('SAY:<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>', "SAY:wet"):
        with client.responses.stream(model="base", input=items, tools=[tool]) as events:
            for _ in events:
                pass
            answer = events.get_final_response()
        (call,) = (item for item in answer.output if item.type == "function_call")
        called.append([call.name, json.loads(call.arguments)])
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        items += [*answer.output, output, user(said)]
    answer = client.responses.create(model="base", input=items, tools=[tool])
    return {"called": called, "answer": answer.output_text}


def errors() -> dict:
    found = {}
    requests = {
        "model": {"model": "nothing", "messages": [user("x")]},
        "context": {"model": "base", "messages": [user("x " * 5000)]},
        "field": {"model": "base", "messages": [user("x")], "temperature": -1},
    }
    for name, body in requests.items():
        try:
            client.chat.completions.create(**body)
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.code, error.param, error.message]
            assert error.request_id
    return found


answers = {
    "models": [model.id for model in client.models.list()],
    "chat": client.chat.completions.create(model="base", messages=[user("SAY:ok")])
    .choices[0]
    .message.content,
    "responses": client.responses.create(model="base", input="SAY:ok").output_text,
    "completion": client.completions.create(model="base", prompt="SAY:ok", max_tokens=2).choices[0].text,
    "stream": streamed(),
    "parsed": client.chat.completions.parse(
        model="base", messages=[user('SAY:{"name": "Oslo", "people": 700000}')], response_format=City
    )
    .choices[0]
    .message.parsed.model_dump(),
    "tools": tools(),
    "agent": agent(),
    "errors": errors(),
}
print(json.dumps(answers))
