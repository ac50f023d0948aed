"""The labelled text of every turn is what the server would have the model write, and nothing else."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import chat_template
from runtime.chat_template import TemplateOptions
from runtime.tuning.data.example import Example
from runtime.tuning.data.preview import runs
from runtime.tuning.data.tokenize import Encoder
from runtime.tuning.data.turns import LONG
from runtime.tuning.settings import Encoding
from tests.tuning.data.template_families import FAMILIES, SPECIAL, Family, Message

TOOLS = ({"type": "function", "function": {"name": "get_order", "parameters": {"type": "object"}}},)
WORDS = [
    "the",
    "answer",
    " is",
    "42",
    "\n",
    "\n\n",
    "  ",
    "é",
    "λ",
    "user",
    "A:",
    "### Response:\n",
    *SPECIAL,
]


def text(draw: Any) -> str:
    """Return some words that hold special tokens, line breaks and the templates' own words."""
    words = draw(st.lists(st.sampled_from(WORDS), max_size=6))
    before, after = draw(st.sampled_from(["", "\n", " "])), draw(st.sampled_from(["", "\n", " ", "\n\n"]))
    return f"{before}w{''.join(words)}v{after}"


@st.composite
def conversations(draw: Any, family: Family, exchanges: int = 3) -> Example:
    """Return a conversation of a few exchanges, with what the family knows of: system, calls, thoughts."""
    messages: list[Message] = []
    untrained: set[int] = set()
    if family.system and draw(st.booleans()):
        messages.append({"role": "system", "content": text(draw)})
    with_tools = family.tools and draw(st.booleans())
    for _ in range(draw(st.integers(1, exchanges))):
        messages.append({"role": "user", "content": text(draw)})
        for number in range(draw(st.integers(0, 2)) if with_tools else 0):
            function = {"name": "get_order", "arguments": {"id": text(draw), "n": number}}
            call = {"id": "a1b2c3d4e", "type": "function", "function": function}
            messages.append(
                {"role": "assistant", "content": draw(st.sampled_from(["", None])), "tool_calls": [call]}
            )
            if family.thoughts and draw(st.booleans()):
                messages[-1]["reasoning_content"] = text(draw).strip("\n")
            messages.append({"role": "tool", "content": text(draw), "tool_call_id": "a1b2c3d4e"})
        answer = {"role": "assistant", "content": text(draw)}
        if family.thoughts and draw(st.booleans()):
            thought = text(draw).strip("\n")
            if draw(st.booleans()) and "m.reasoning_content" in family.template:
                answer["reasoning_content"] = thought
            elif "'</think>'" in family.template:
                answer["content"] = f"<think>\n{thought}\n</think>\n\n{answer['content'].lstrip()}"
        if draw(st.integers(0, 5)) == 0:
            untrained.add(len(messages))
        messages.append(answer)
    return Example(tuple(messages), tools=TOOLS if with_tools else (), untrained=frozenset(untrained))


def check(family: Family, example: Example) -> int:
    """Compare every labelled run with the family's completion, what is before with the server's prompt.

    Returns how many sequences there were.
    """
    tokenizer = family.tokenizer()
    encoder = Encoder(tokenizer, Encoding(), max_tokens=10**6, end_ids=family.end_ids())
    messages = [{**m, "content": m["content"] or ""} for m in example.messages]
    turns = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index not in example.untrained
    ]
    expected = [
        (
            chat_template.render(
                tokenizer, messages[:index], TemplateOptions(tools=list(example.tools) or None)
            ),
            family.completion(messages, index),
        )
        for index in turns
    ]
    found, joined = [], []
    sequences = encoder.encode(example).sequences
    for number, sequence in enumerate(sequences):
        before = ""
        for run in runs(sequence, tokenizer):
            if run.labelled:
                found.append((before, run.text))
                joined.append(number)
            before += run.text
        assert run.labelled, "nothing follows the last answer"
    header = "<|im_start|>assistant\n" if name_of(family) == "generation blocks" else ""
    assert found == [(prompt + header, completion) for prompt, completion in expected]
    for turn, (before, after) in enumerate(pairwise(found)):
        assert (joined[turn] == joined[turn + 1]) == after[0].startswith("".join(before))
    return len(sequences)


def name_of(family: Family) -> str:
    return next(name for name, other in FAMILIES.items() if other is family)


@pytest.mark.parametrize("name", FAMILIES)
def test_labelled_text_is_what_the_server_would_have_to_generate(name: str) -> None:
    family = FAMILIES[name]

    @settings(max_examples=30, derandomize=True, database=None)
    @given(conversations(family))
    def holds(example: Example) -> None:
        if example.messages and len(example.untrained) < sum(
            m["role"] == "assistant" for m in example.messages
        ):
            check(family, example)

    holds()


@pytest.mark.parametrize("name", FAMILIES)
def test_long_conversation_is_labelled_as_its_turns_are(name: str) -> None:
    family, messages = FAMILIES[name], []
    for number in range(LONG // 2 + 4):
        messages += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer <|im_end|> {number}\n"},
        ]
        if family.tools and number % 5 == 2:
            function = {"name": "get_order", "arguments": {"id": "x", "n": number}}
            call = {"id": "a1b2c3d4e", "type": "function", "function": function}
            messages[-1:-1] = [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "sent", "tool_call_id": "a1b2c3d4e"},
            ]
    tools = TOOLS if family.tools else ()
    last_answer = len(messages) - 3
    sequences = check(family, Example(tuple(messages), tools=tools, untrained=frozenset({last_answer})))
    assert (sequences > 1) == (name in REWRITING)


REWRITING = {
    "qwen3",
    "qwen3 thinking",
    "nemotron",
    "deepseek r1",
    "harmony",
    "mistral v3",
    "closed thought",
    "falcon",
    "alpaca",
    "gemma 4",
    "phi-3 by its eos alone",
    "last messages only",
}
"""Families that show an answer otherwise once others follow, or ask with more than they then show."""
