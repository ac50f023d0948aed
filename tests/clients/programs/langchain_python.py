"""langchain-openai: chat, stream, an agent's messages with a tool, structured output by both of its ways."""

import json
import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

model = ChatOpenAI(model="base", base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)


class City(BaseModel):
    """What the structured answer is."""

    name: str
    people: int


@tool
def weather(city: str) -> str:
    """Return the weather of a city."""
    return "rain in " + city


def tools() -> dict:
    agent = model.bind_tools([weather])
    asked = [
        SystemMessage("be brief"),
        HumanMessage('SAY:<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'),
    ]
    first = agent.invoke(asked)
    result = weather.invoke(first.tool_calls[0])
    assert isinstance(result, ToolMessage)
    second = agent.invoke([*asked, first, result, AIMessage(""), HumanMessage("SAY:wet")])
    return {"call": [first.tool_calls[0]["name"], first.tool_calls[0]["args"]], "answer": second.content}


def structured(method: str, said: str) -> dict:
    return model.with_structured_output(City, method=method).invoke("SAY:" + said).model_dump()


city = {"name": "Oslo", "people": 700000}
answers = {
    "chat": model.invoke("SAY:ok").content,
    "stream": {"text": "".join(chunk.content for chunk in model.stream("SAY:a\u2028b ünd 😀"))},
    "tools": tools(),
    "json_schema": structured("json_schema", json.dumps(city)),
    "function_calling": structured("function_calling", json.dumps({"name": "City", "arguments": city})),
}
print(json.dumps(answers))
