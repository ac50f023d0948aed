"""Answers that must be a call, or have a form: in every spelling, and behind a thought."""

import json
from dataclasses import replace
from typing import Any

import pytest

from runtime.errors import RequestError
from runtime.serving.answer_parsers.formats import CALLS, REASONING
from runtime.serving.answer_parsers.forms import AnswerForm
from runtime.serving.answer_parsers.grammars import ForcedCalls, spelled
from runtime.serving.answer_parsers.parser import AnswerParser
from runtime.serving.answer_parsers.parts import ParsedAnswer
from runtime.serving.detokenize import marked
from runtime.serving.engine.protocol import Constraint
from runtime.serving.structured_output.forms import form_of
from tests.costs import assert_linear
from tests.serving.answer_parsers import spelled as spellings
from tests.serving.conftest import make_tokenizer

llguidance = pytest.importorskip("llguidance")

TOOLS = spellings.TOOLS
ASKED = [("weather", {"city": "Oslo", "days": 3})]
CITY = {**TOOLS["weather"], "additionalProperties": False}
ENTRY = '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}'
ARGUMENTS = '{"city": "Oslo", "days": 3}'
WRITTEN = {
    "hermes": f"<tool_call>\n{ENTRY}\n</tool_call>",
    "qwen3_coder": spellings.coder(*ASKED[0]),
    "llama3_json": ENTRY.replace("arguments", "parameters"),
    "pythonic": '[weather(city="Oslo", days=3)]',
    "llama4_pythonic": '<|python_start|>[weather(city="Oslo", days=3)]<|python_end|>',
    "mistral": f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}",
    "phi4_mini_json": f"functools[{ENTRY}]",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    f"{ARGUMENTS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    f"```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "granite": f"<tool_call>[{ENTRY}]",
    "glm45": spellings.glm(*ASKED[0]),
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
    f"<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>",
    "gemma4": '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>',
    "openai": f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}",
}
SPECIALS = (
    "[TOOL_CALLS]", "[ARGS]", "<|python_start|>", "<|python_end|>", "<|tool_calls_section_begin|>",
    "<|tool_call>", "<tool_call|>", '<|"|>', *spellings.HARMONY_SPECIALS,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    return made


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> Any:
    return llguidance.LLTokenizer(tokenizer.backend_tokenizer.to_str(), eos_token=tokenizer.eos_token_id)


def special(tokenizer: Any, *left_out: str) -> dict[str, int]:
    known = tokenizer.added_tokens_decoder.items()
    return {str(token): number for number, token in known if str(token) not in left_out}


def allows(constraint: Constraint, text: str, tokenizer: Any, tokens: Any) -> bool:
    """Whether an answer that must match `constraint` may be `text`, and end there."""
    matcher = llguidance.LLMatcher(tokens, form_of(constraint).grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return all(matcher.consume_token(token) for token in tokenizer.encode(text)) and matcher.is_accepting()


def forms(name: str) -> AnswerForm:
    return AnswerForm(calls=CALLS[name], harmony=name == "openai", tools=TOOLS)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_forced_call_is_spelled_as_its_family_does(name: str, tokenizer: Any, tokens: Any) -> None:
    form, known = forms(name), special(tokenizer)
    forced = ForcedCalls({"weather": CITY}, "tool_choice")
    constraint = spelled(form, None, forced, prompt="", special=known)
    assert constraint is not None
    assert allows(constraint, WRITTEN[name], tokenizer, tokens)
    assert not allows(constraint, WRITTEN[name].replace("weather", "whether"), tokenizer, tokens)
    assert not allows(constraint, "Hello", tokenizer, tokens)
    marks = {text: chr(0xD800 + n) for n, text in enumerate(known)}
    parser, answer = AnswerParser(form, marks=marks), ParsedAnswer()
    answer.add(parser.feed(marked(WRITTEN[name], marks)) + parser.finish())
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == ASKED


def test_a_format_has_its_older_spelling_where_the_token_is_missing(tokenizer: Any, tokens: Any) -> None:
    forced = ForcedCalls({"weather": CITY}, "tool_choice")
    known = special(tokenizer, "[ARGS]")
    constraint = spelled(forms("mistral"), None, forced, prompt="", special=known)
    assert constraint is not None
    assert allows(constraint, f"[TOOL_CALLS][{ENTRY}]", tokenizer, tokens)


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "pythonic", "qwen3_coder", "mistral"])
def test_several_calls_follow_each_other(name: str, tokenizer: Any, tokens: Any) -> None:
    forced = ForcedCalls({"weather": CITY, "now": {}}, "tool_choice", several=True)
    two = {
        "hermes": f"{WRITTEN['hermes']}\n{WRITTEN['hermes']}",
        "llama3_json": f"{WRITTEN['llama3_json']}; {WRITTEN['llama3_json']}",
        "pythonic": '[weather(city="Oslo", days=3), weather(city="x")]',
        "qwen3_coder": f"{WRITTEN['qwen3_coder']}\n{WRITTEN['qwen3_coder']}",
        "mistral": WRITTEN["mistral"] * 2,
    }[name]
    one = spelled(forms(name), None, replace(forced, several=False), prompt="", special=special(tokenizer))
    many = spelled(forms(name), None, forced, prompt="", special=special(tokenizer))
    assert one is not None
    assert many is not None
    assert allows(many, two, tokenizer, tokens)
    assert not allows(one, two, tokenizer, tokens)


SCHEMA = Constraint("schema", {"type": "integer"}, "response_format")


@pytest.mark.parametrize(
    ("reasoning", "prompt", "text", "allowed"),
    [
        ("qwen3", "", "5", True),
        ("qwen3", "", "<think>\nhm</think>\n\n5", True),
        ("qwen3", "", "hm</think>\n\n5", False),
        ("qwen3", "<think>\n", "hm</think>\n\n5", True),
        ("qwen3", "<think>\n", "5", False),
        ("qwen3", "<think>\n\n</think>\n\n", "5", True),
        ("qwen3", "<think>\n\n</think>\n\n", "hm</think>5", False),
        ("deepseek_r1", "", "hm</think>5", True),
        ("granite", "", "Here's my thought process: a. Here is my response:\n5", True),
        ("openai_gptoss", "", "<|channel|>final<|message|>5", True),
        (
            "openai_gptoss",
            "",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>5",
            True,
        ),
        ("openai_gptoss", "", "5", False),
    ],
)
def test_a_schema_binds_what_follows_the_thought(
    reasoning: str, prompt: str, text: str, allowed: bool, tokenizer: Any, tokens: Any
) -> None:
    form = AnswerForm(thoughts=REASONING[reasoning], harmony=reasoning == "openai_gptoss")
    constraint = spelled(form, SCHEMA, None, prompt=prompt, special=special(tokenizer))
    assert constraint is not None
    assert allows(constraint, text, tokenizer, tokens) == allowed


def test_patterns_and_grammars_follow_thoughts_too(tokenizer: Any, tokens: Any) -> None:
    form = AnswerForm(thoughts=REASONING["qwen3"])
    for asked in (Constraint("regex", "a+/", "regex"), Constraint("grammar", 'start: "aa/"', "grammar")):
        constraint = spelled(form, asked, None, prompt="<think>", special={})
        assert constraint is not None
        assert allows(constraint, "b</think>aa/", tokenizer, tokens)
        assert not allows(constraint, "b</think>b", tokenizer, tokens)


def test_an_answer_without_thoughts_keeps_its_constraint() -> None:
    assert spelled(AnswerForm(), SCHEMA, None, prompt="", special={}) is SCHEMA
    assert spelled(AnswerForm(), None, None, prompt="", special={}) is None


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45"])
@pytest.mark.parametrize(
    ("schema", "values", "not_this"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}, ["Oslo", "null"], None),
        ({"type": ["string", "null"]}, ["Oslo", "null"], None),
        ({"$ref": "#/$defs/Unit"}, ["1"], "3"),
        ({"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]}, ["1", "null"], "3"),
        ({"const": "7"}, ["7"], "8"),
        ({"enum": ["1", "b"]}, ["1"], "3"),
        ({}, ["Oslo"], None),
        ({"$ref": "#/$defs/Count"}, ["3"], "x"),
    ],
)
def test_forced_texts_are_plain_wherever_the_schema_says_that_they_are_texts(
    schema: Any, values: list[str], not_this: str | None, name: str, tokenizer: Any, tokens: Any
) -> None:
    shared = {"Unit": {"type": "string", "enum": ["1", "2"]}, "Count": {"type": "integer"}}
    tools = {"f": {"type": "object", "properties": {"x": schema}, "required": ["x"], "$defs": shared}}
    form = AnswerForm(calls=CALLS[name], tools=tools)
    forced = ForcedCalls(tools, "tool_choice")
    constraint = spelled(form, None, forced, prompt="", special=special(tokenizer))
    assert constraint is not None
    write = {"qwen3_coder": spellings.coder, "glm45": spellings.glm}[name]
    assert [allows(constraint, write("f", {"x": value}), tokenizer, tokens) for value in values] == [
        True
    ] * len(values)
    if not_this is not None:
        assert not allows(constraint, write("f", {"x": not_this}), tokenizer, tokens)


def test_the_arguments_that_are_required_are_looked_up_at_a_cost_in_proportion() -> None:
    def force(size: int) -> None:
        schema = {
            "properties": {f"a{number}": {"type": "string"} for number in range(size)},
            "required": [f"b{number}" for number in range(4 * size)],
        }
        spelled(AnswerForm(calls=CALLS["qwen3_coder"]), None, ForcedCalls({"f": schema}, "tool_choice"),
                prompt="", special={})  # fmt: skip

    assert_linear(force, 100, 1_600)


@pytest.mark.parametrize("required", [5, "x", {"x": 1}, [["x"]]])
def test_required_arguments_that_are_no_list_of_names_are_refused(required: Any) -> None:
    schema = {"properties": {"x": {"type": "string"}}, "required": required}
    forced = ForcedCalls({"f": schema}, "tool_choice")
    with pytest.raises(
        RequestError, match="'tool_choice': 'required' of 'f' is not a list of names"
    ) as refused:
        spelled(AnswerForm(calls=CALLS["qwen3_coder"]), None, forced, prompt="", special={})
    assert refused.value.param == "tool_choice"
