"""Answers as each family writes them, for the tests of parsers and of routes.

Each has a thought, where the family thinks, a text before the calls, where it may write one, and two calls.
"""

import json
from dataclasses import dataclass
from typing import Any

from runtime.serving.answer_parsers.forms import Tools

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("weather", {"city": 'Köln }] "x" </tool_call>', "days": 3}),
    ("clock.now", {}),
]
PLAIN: list[tuple[str, dict[str, Any]]] = [("weather", {"city": "Köln", "days": 3}), ("clock.now", {})]
TOOLS: Tools = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "clock.now": {"type": "object", "properties": {}},
}
TEXT = "Let me see."


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def objects(key: str = "arguments", calls: list[tuple[str, dict[str, Any]]] = CALLS) -> list[str]:
    """Return each call as a JSON object."""
    return [dumped({"name": name, key: arguments}) for name, arguments in calls]


def coder(name: str, arguments: dict[str, Any]) -> str:
    """Return a call as Qwen3-Coder writes it."""
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def pythonic(calls: list[tuple[str, dict[str, Any]]] = PLAIN) -> str:
    """Return calls as Python."""
    written = (
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    )
    return f"[{', '.join(written)}]"


def glm(name: str, arguments: dict[str, Any]) -> str:
    """Return a call as GLM 4.5 writes it."""
    pairs = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items()
    )
    return f"<tool_call>{name}\n{pairs}</tool_call>"


def deepseek(*, fenced: bool) -> str:
    """Return calls as DeepSeek V3 (`fenced`) and V3.1 write them."""
    written = []
    for name, arguments in CALLS:
        body = f"function<｜tool▁sep｜>{name}\n```json\n{dumped(arguments)}\n```"
        plain = f"{name}<｜tool▁sep｜>{dumped(arguments)}"
        written.append(f"<｜tool▁call▁begin｜>{body if fenced else plain}<｜tool▁call▁end｜>")
    return f"<｜tool▁calls▁begin｜>{''.join(written)}<｜tool▁calls▁end｜>"


@dataclass(frozen=True, slots=True)
class Spelling:
    """One answer, by vLLM's names of the parsers that it is for."""

    text: str
    calls: str
    reasoning: str | None = None
    prompt: str = ""
    """What the prompt ends with."""
    content: str = TEXT
    called: tuple[tuple[str, dict[str, Any]], ...] = tuple(CALLS)
    specials: tuple[str, ...] = ()
    """Special tokens of the family."""

    @property
    def thought(self) -> str:
        return "The user asks. <tool_call>{}" if self.reasoning else ""


def thinking(start: str = "<think>", end: str = "</think>") -> str:
    """Return a thought that mentions a call."""
    return (
        f"{start}\nThe user asks. <tool_call>{{}}\n{end}\n\n"
        if start
        else f"\nThe user asks. <tool_call>{{}}\n{end}\n\n"
    )


HARMONY = (
    "<|channel|>analysis<|message|>The user asks. <tool_call>{}<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|>"
    + "".join(
        f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{dumped(arguments)}<|call|>"
        for name, arguments in CALLS
    )
)
HARMONY_SPECIALS = (
    "<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|return|>", "<|call|>",
)  # fmt: skip

_HERMES = "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects())

SPELLINGS: dict[str, Spelling] = {
    "hermes": Spelling(f"{TEXT}\n{_HERMES}", "hermes"),
    "qwen3": Spelling(f"{thinking()}{TEXT}\n\n{_HERMES}", "hermes", "qwen3"),
    "qwen3, opened by the prompt": Spelling(
        f"{thinking('')}{TEXT}\n{_HERMES}\n", "hermes", "qwen3", prompt="assistant\n<think>\n"
    ),
    "qwen3-coder": Spelling(
        f"{TEXT}\n" + "\n".join(coder(*call) for call in PLAIN), "qwen3_coder", called=tuple(PLAIN)
    ),
    "llama 3": Spelling("; ".join(objects("parameters")), "llama3_json", content=""),
    "llama 3, tagged": Spelling(
        "<|python_tag|>" + "; ".join(objects("parameters")), "llama3_json", content="",
        specials=("<|python_tag|>",),
    ),
    "llama 3, after text": Spelling(
        f"{TEXT} {objects('parameters')[0]}", "llama3_json",
        called=tuple(CALLS[:1]),
    ),
    "llama 3.2": Spelling(pythonic(), "pythonic", content="", called=tuple(PLAIN)),
    "llama 4": Spelling(
        f"<|python_start|>{pythonic()}<|python_end|>", "llama4_pythonic", content="", called=tuple(PLAIN),
        specials=("<|python_start|>", "<|python_end|>"),
    ),
    "mistral": Spelling(
        f"{TEXT}[TOOL_CALLS][{', '.join(objects())}]", "mistral", specials=("[TOOL_CALLS]",)
    ),
    "mistral, since 2025": Spelling(
        f"[THINK]The user asks. <tool_call>{{}}[/THINK]{TEXT}"
        + "".join(f"[TOOL_CALLS]{name}[ARGS]{dumped(arguments)}" for name, arguments in CALLS),
        "mistral", "mistral", specials=("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
    ),
    "phi-4-mini": Spelling(
        f"functools[{', '.join(objects())}]", "phi4_mini_json", content="", specials=("<|tool_call|>",)
    ),
    "phi-4-mini, tagged": Spelling(
        f"<|tool_call|>[{', '.join(objects())}]<|/tool_call|>", "phi4_mini_json", content="",
        specials=("<|tool_call|>", "<|/tool_call|>"),
    ),
    "deepseek v3": Spelling(TEXT + deepseek(fenced=True), "deepseek_v3"),
    "deepseek v3.1": Spelling(
        thinking("") + TEXT + deepseek(fenced=False), "deepseek_v31", "deepseek_v3",
        prompt="<｜Assistant｜><think>",
    ),
    "granite 3": Spelling(
        f"Here is my thought process: The user asks. <tool_call>{{}}\nHere's my response: {TEXT}"
        f"<|tool_call|>[{', '.join(objects())}]", "granite", "granite", specials=("<|tool_call|>",),
    ),
    "granite 3.3": Spelling(f"<tool_call>[{', '.join(objects())}]", "granite", content=""),
    "glm 4.5": Spelling(
        f"{thinking()}{TEXT}\n" + "\n".join(glm(*call) for call in PLAIN), "glm45", "glm45",
        called=tuple(PLAIN),
    ),
    "kimi k2": Spelling(
        TEXT + "<|tool_calls_section_begin|>"
        + "".join(
            f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{dumped(arguments)}<|tool_call_end|>"
            for i, (name, arguments) in enumerate(CALLS)
        )
        + "<|tool_calls_section_end|>", "kimi_k2",
    ),
    "gemma 4": Spelling(
        f"<|channel>thought\nThe user asks. <tool_call>{{}}\n<channel|>{TEXT}"
        '<|tool_call>call:weather{city:<|"|>Köln }, "x"<|"|>,days:3,more:[<|"|>a<|"|>,{b:true}]}<tool_call|>'
        "<|tool_call>call:clock.now{}<tool_call|>", "gemma4", "gemma4",
        called=(
            ("weather", {"city": 'Köln }, "x"', "days": 3, "more": ["a", {"b": True}]}), ("clock.now", {}),
        ),
        specials=("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
    ),
    "gpt-oss": Spelling(HARMONY, "openai", "openai_gptoss", specials=HARMONY_SPECIALS),
}  # fmt: skip
