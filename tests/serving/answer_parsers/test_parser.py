"""Answers in every spelling: their parts, and that no division of the text changes them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.serving.answer_parsers.formats import CALLS, REASONING
from runtime.serving.answer_parsers.forms import AnswerForm, CallFormat
from runtime.serving.answer_parsers.parser import AnswerParser
from runtime.serving.answer_parsers.parts import CallArguments, CallEnd, CallStart, ParsedAnswer
from runtime.serving.answer_text import delimiters as answer_delimiters
from runtime.serving.detokenize import marked
from tests.costs import assert_linear
from tests.serving.answer_parsers.spelled import SPELLINGS, TEXT, TOOLS, Spelling, dumped

NAMES = sorted(SPELLINGS)


def form_of(spelling: Spelling, **changed: Any) -> AnswerForm:
    thoughts = REASONING[spelling.reasoning] if spelling.reasoning else None
    harmony = spelling.reasoning == "openai_gptoss"
    form = AnswerForm(thoughts=thoughts, calls=CALLS[spelling.calls], harmony=harmony, tools=TOOLS)
    return replace(form, **changed)


def marks_of(spelling: Spelling) -> dict[str, str]:
    return {text: chr(0xD800 + n) for n, text in enumerate(spelling.specials)}


def read(pieces: Sequence[str], form: AnswerForm, spelling: Spelling) -> ParsedAnswer:
    """Read an answer that arrives in `pieces`, whose special tokens are marked."""
    parser, answer = AnswerParser(form, marks=marks_of(spelling), prompt=spelling.prompt), ParsedAnswer()
    for piece in pieces:
        answer.add(parser.feed(piece))
    answer.add(parser.finish())
    return answer


def shown(answer: ParsedAnswer) -> tuple[str, str, list[tuple[str, Any]]]:
    return (
        answer.reasoning,
        answer.content,
        [(call.name, json.loads(call.arguments)) for call in answer.calls],
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_family_is_read(name: str) -> None:
    spelling = SPELLINGS[name]
    found = shown(read([marked(spelling.text, marks_of(spelling))], form_of(spelling), spelling))
    assert found == (spelling.thought, spelling.content, list(spelling.called))


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_functions_that_may_not_be_called_are_text(name: str) -> None:
    spelling = SPELLINGS[name]
    form = form_of(spelling, tools={"another": {}}, only_tools=True)
    thought, content, calls = shown(read([marked(spelling.text, marks_of(spelling))], form, spelling))
    assert (thought, calls) == (spelling.thought, [])
    assert content.startswith(spelling.content.rstrip())
    assert len(content) > len(spelling.content)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_no_division_of_the_text_changes_the_answer(name: str, data: st.DataObject) -> None:
    spelling = SPELLINGS[name]
    text = marked(spelling.text, marks_of(spelling))
    text = text[: data.draw(st.integers(0, len(text)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=30)))
    starts, ends = [0, *cuts], [*cuts, len(text)]
    pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    form = form_of(spelling)
    assert shown(read(pieces, form, spelling)) == shown(read([text], form, spelling))


@pytest.mark.parametrize("name", NAMES)
def test_text_without_calls_or_thoughts_is_kept_to_the_last_space(name: str) -> None:
    spelling = replace(SPELLINGS[name], prompt="")
    text = " {braces} [brackets], <tags>\n and 'quotes' \n"
    form = form_of(spelling)
    expected = text.lstrip() if form.harmony else text
    assert shown(read(list(text), form, spelling)) == ("", expected, [])


def test_a_calls_parts_come_in_order() -> None:
    spelling = SPELLINGS["hermes"]
    parts = AnswerParser(form_of(spelling)).feed(spelling.text)
    kinds = [(type(part), getattr(part, "index", None)) for part in parts][1:]
    assert kinds == [(kind, n) for n in (0, 1) for kind in (CallStart, CallArguments, CallEnd)]
    assert len({part.id for part in parts if isinstance(part, CallStart)}) == 2


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{broken</tool_call>",
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"city": "O',
        '{"name": "nobody", "parameters": {}}',
        "[1, 2]",
        "the tag <tool_call> opens a call",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    spelling = SPELLINGS["hermes"]
    assert shown(read(list(text), form_of(spelling), spelling)) == ("", text, [])


def test_a_call_between_tags_may_name_any_function() -> None:
    spelling = replace(SPELLINGS["hermes"], text='<tool_call>{"name": "nobody"}</tool_call>')
    assert shown(read([spelling.text], form_of(spelling), spelling))[2] == [("nobody", {})]


@pytest.mark.parametrize("name", ["mistral", "mistral, since 2025", "llama 4"])
def test_an_opening_that_is_no_special_token_is_met_as_text(name: str) -> None:
    spelling = replace(SPELLINGS[name], specials=())
    text = spelling.text[spelling.text.find("[TOOL_CALLS]") if "mistral" in name else 0 :]
    assert len(read(list(text), form_of(spelling), spelling).calls) == 2


def test_text_around_calls_is_kept() -> None:
    call = '<tool_call>{"name": "weather"}</tool_call>'
    spelling = replace(SPELLINGS["hermes"], text=f"one\n{call}\n{call} two\n")
    assert shown(read(list(spelling.text), form_of(spelling), spelling))[1] == "one\n\n two\n"


def test_without_tools_calls_are_text() -> None:
    spelling = SPELLINGS["hermes"]
    assert shown(read([spelling.text], form_of(spelling, tools={}), spelling)) == ("", spelling.text, [])


def test_of_several_calls_the_first_where_one_is_asked_for() -> None:
    for name in ("hermes", "gpt-oss", "llama 3"):
        spelling = SPELLINGS[name]
        text = marked(spelling.text, marks_of(spelling))
        answer = read([text], form_of(spelling, one_call=True), spelling)
        assert [call.name for call in answer.calls] == ["weather"]


def test_a_thought_without_an_end_is_all_there_is() -> None:
    spelling = replace(SPELLINGS["qwen3"], text="<think>\nHm, ")
    assert shown(read(list(spelling.text), form_of(spelling), spelling)) == ("Hm,", "", [])


def test_a_thought_that_the_prompt_closed_is_not_begun() -> None:
    spelling = replace(SPELLINGS["qwen3"], prompt="<think>\n\n</think>\n\n", text="Hello")
    assert (
        shown(read(["Hello"], form_of(spelling, thoughts=REASONING["deepseek_r1"]), spelling))[1] == "Hello"
    )


def test_deepseek_r1_thinks_from_the_beginning() -> None:
    form = AnswerForm(thoughts=REASONING["deepseek_r1"])
    spelling = replace(SPELLINGS["qwen3"], prompt="assistant")
    assert shown(read(["a thought</think>", "\n\nHello"], form, spelling)) == ("a thought", "Hello", [])


@pytest.mark.parametrize(
    ("text", "thought", "content", "calls"),
    [
        ("Hello, world", "", "Hello, world", []),
        (" H", "", "H", []),
        ("<|channel|>final<|message|>Hello<|return|>", "", "Hello", []),
        (" to=functions.weather<|channel|>commentary<|message|>{}<|call|>", "", "", [("weather", {})]),
        ("<|channel|>analysis to=functions.weather<|message|>{}", "", "", [("weather", {})]),
        ("<|channel|>commentary to=functions.weather<|message|>{\"ci", "", '{"ci', []),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b",
         "a\n\nb", "", []),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>fin", "a", "", []),
    ],
)  # fmt: skip
def test_harmonys_messages(text: str, thought: str, content: str, calls: list[Any]) -> None:
    spelling = SPELLINGS["gpt-oss"]
    found = read([marked(text, marks_of(spelling))], form_of(spelling), spelling)
    assert shown(found) == (thought, content, calls)


def test_harmonys_delimiters_spelled_as_text_are_text() -> None:
    spelling = SPELLINGS["gpt-oss"]
    marks = marks_of(spelling)
    parser = AnswerParser(form_of(spelling), marks=marks)
    answer = ParsedAnswer()
    answer.add(parser.feed(marked("<|channel|>final<|message|>", marks) + "write <|end|> there"))
    answer.add(parser.finish())
    assert answer.content == "write <|end|> there"


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": ["boolean", "null"]}, "True", True),
        ({"type": "array"}, "[1]", [1]),
        ({}, '{"a": 1}', {"a": 1}),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "x", "x"),
        ({"$ref": "#/$defs/Unit"}, "1", "1"),
        ({"allOf": [{"$ref": "#/$defs/Unit"}], "description": "of what"}, "1", "1"),
        ({"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]}, "2", "2"),
        ({"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]}, "null", None),
        ({"const": "7"}, "7", "7"),
        ({"$ref": "#/$defs/Loop"}, "7", 7),
        ({"$ref": "#/nowhere/0"}, "7", 7),
    ],
)
def test_plain_arguments_get_their_schemas_types(schema: Any, text: str, value: Any) -> None:
    spelling = SPELLINGS["qwen3-coder"]
    shared = {"Unit": {"type": "string", "enum": ["1", "2"]}, "Loop": {"$ref": "#/$defs/Loop"}}
    tools = {"f": {"properties": {"x": schema}, "$defs": shared}}
    answer = f"<tool_call>\n<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>\n</tool_call>"
    assert shown(read([answer], form_of(spelling, tools=tools), spelling))[2] == [("f", {"x": value})]


def test_python_that_is_no_list_of_calls_is_text() -> None:
    spelling = SPELLINGS["llama 3.2"]
    for text in (
        "[weather(open('x'))]",
        "[weather('Oslo')]",
        "[1, 2]",
        "[x for x in y]",
        "[" * 500,
        "[weather(**x)]",
        "[weather(city=clock(x=1))]",
        "[weather(city==1)]",
        "[(weather)(lambda x=1: 2)]",
    ):
        assert shown(read([text], form_of(spelling), spelling))[1:] == (text, [])


def test_reasoning_is_counted_by_position() -> None:
    text = "<think>\nab</think>\n\ncd"
    parser = AnswerParser(AnswerForm(thoughts=REASONING["qwen3"]))
    parser.feed(text)
    parser.finish()
    assert [text[start:end] for start, end in parser.thoughts] == ["\nab"]
    assert parser.taken == len(text)


def test_text_is_not_held_back_without_need() -> None:
    spelling = SPELLINGS["hermes"]
    parser, answer = AnswerParser(form_of(spelling)), ParsedAnswer()
    answer.add(parser.feed(f"{TEXT} And <tool"))
    assert answer.content == f"{TEXT} And"
    assert parser.held == len(" <tool") or parser.held == len("<tool")
    assert dumped(answer.calls) == "[]"


def test_a_long_call_costs_the_same_for_each_token_of_it() -> None:
    form, marks = form_of(SPELLINGS["hermes"]), {"<tool_call>": "\ud800", "</tool_call>": "\ud801"}

    def read_call(tokens: int) -> None:
        parser, waiting = AnswerParser(form, marks=marks), len('{"name": "weather", "arguments": {"city": "')
        parser.feed(marked('<tool_call>{"name": "weather", "arguments": {"city": "', marks))
        for _ in range(tokens):
            parser.feed("text")
            waiting += len("text")
            assert parser.held == waiting
        assert len(parser.feed(marked('"}}</tool_call>', marks))) == 3
        assert parser.held == 0

    assert_linear(read_call, 250, 4_000)


def _begun(calls: CallFormat) -> str:
    """Return a call in a format's own spelling up to where its first argument's value begins."""
    spelling = calls.spelling
    head = spelling.before + spelling.call.partition("{arguments}")[0].replace("{name}", "f")
    return head + (spelling.argument.partition("{value}")[0].replace("{key}", "x") or '{"x": ')


REPEATED = {
    **{f"{name}, begun": (AnswerForm(calls=calls, tools={"f": {}}), _begun(calls))
       for calls, name in {calls: name for name, calls in CALLS.items() if calls}.items()},
    **{f"{name}, {opening}": (AnswerForm(calls=calls, tools={"f": {}}), opening + " f")
       for calls, name in {calls: name for name, calls in CALLS.items() if calls}.items()
       for opening in (*calls.openings, *calls.inline)},
    **{f"{name}, thoughts": (AnswerForm(thoughts=thoughts), f"{thoughts.starts[0]} a {thoughts.ends[0]} b")
       for thoughts, name in {thoughts: name for name, thoughts in REASONING.items() if thoughts}.items()},
    "harmony": (
        AnswerForm(harmony=True, tools={"f": {}}),
        "<|channel|>commentary to=functions.f<|message|>{<|end|><|channel|>analysis<|message|>a<|end|>",
    ),
    "undeclared": (AnswerForm(calls=CALLS["llama3_json"], tools={"f": {}}), '{"name": "g"};'),
    "calls and one begun": (AnswerForm(calls=CALLS["hermes"], tools={"f": {}}), '<tool_call>{"name": "f"}{'),
    "values of which some delimiters are not in the text": (
        AnswerForm(calls=CALLS["gemma4"], tools={"f": {}}), "<|tool_call>call:f{a:1,"),
    "white space": (AnswerForm(calls=CALLS["hermes"], tools={"f": {}}), "\n" * 30),
    "white space in a thought": (AnswerForm(thoughts=REASONING["deepseek_r1"]), "\n" * 30),
}  # fmt: skip


@pytest.mark.parametrize("token", [2**20, 3], ids=["at once", "as tokens"])
@pytest.mark.parametrize("name", REPEATED)
def test_an_answer_that_repeats_itself_costs_no_more_for_each_character(name: str, token: int) -> None:
    form, repeated = REPEATED[name]
    delimiters = {*answer_delimiters(form), *(form.calls.inline if form.calls else ())}
    marks = {text: chr(0xD800 + n) for n, text in enumerate(sorted(delimiters))} if form.thoughts else {}

    def parse(times: int) -> None:
        text = marked(repeated, marks) * times
        parser = AnswerParser(form, marks=marks)
        for start in range(0, len(text), token):
            parser.feed(text[start : start + token])
        parser.finish()

    assert_linear(parse, 150, 1_000)


def test_calls_behind_few_openings_that_are_none_are_found() -> None:
    spelling = SPELLINGS["llama 3, after text"]
    text = f'{{"name" begins an object. {"x" * 50_000} {{"name" too. {spelling.text}'
    assert [call.name for call in read([text], form_of(spelling), spelling).calls] == ["weather"]


def test_what_follows_the_last_of_deepseeks_calls_is_kept() -> None:
    spelling = SPELLINGS["deepseek v3.1"]
    call, begun = (
        "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜> is begun",
    )
    answer = read([f"<｜tool▁calls▁begin｜>{call}{begun}"], form_of(spelling, thoughts=None), spelling)
    assert shown(answer)[1:] == (begun, [("weather", {})])


ODD = ("3d_render", "get-the-weather", "server/tool", "server:tool", "n" * 64)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    ("calls", "written"),
    [
        ("hermes", '<tool_call>{"name": "NAME", "arguments": {"x": "v"}}</tool_call>'),
        ("qwen3_coder", "<tool_call><function=NAME><parameter=x>v</parameter></function></tool_call>"),
        ("pythonic", '[NAME(x="v")]'),
        ("mistral", '[TOOL_CALLS]NAME[ARGS]{"x": "v"}'),
        ("glm45", "<tool_call>NAME<arg_key>x</arg_key><arg_value>v</arg_value></tool_call>"),
        ("gemma4", '<|tool_call>call:NAME{x:<|"|>v<|"|>}<tool_call|>'),
        ("minimax_m2", '<minimax:tool_call><invoke name="NAME"><parameter name="x">v</parameter></invoke>'),
        ("openai", '<|channel|>commentary to=functions.NAME<|constrain|>json<|message|>{"x": "v"}<|call|>'),
    ],
)
def test_a_declared_function_is_called_whatever_its_name(calls: str, written: str, name: str) -> None:
    form = AnswerForm(calls=CALLS[calls], harmony=calls == "openai", tools={name: {}})
    parser, answer = AnswerParser(form), ParsedAnswer()
    answer.add(parser.feed(written.replace("NAME", name)) + parser.finish())
    assert shown(answer) == ("", "", [(name, {"x": "v"})])


@pytest.mark.parametrize("key", ["from", "start-date", "in", "None"])
def test_python_arguments_may_have_names_that_are_none_in_python(key: str) -> None:
    spelling = SPELLINGS["llama 3.2"]
    text = f'[weather(city="from(in=1)", {key}=[1, {{"from": "a=b"}}])]'
    called = [("weather", {"city": "from(in=1)", key: [1, {"from": "a=b"}]})]
    assert shown(read([text], form_of(spelling), spelling)) == ("", "", called)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "WRITTEN"}}</tool_call>'),
        ("llama 3.2", '[weather(city="WRITTEN")]'),
    ],
)
@pytest.mark.parametrize(
    ("written", "city"), [(r"\ud83d\ude00", "\U0001f600"), (r"a\ud83d", "a\ufffd"), (r"\ude00b", "\ufffdb")]
)
def test_halves_of_a_character_in_arguments_are_joined_or_replaced(
    name: str, text: str, written: str, city: str
) -> None:
    spelling = SPELLINGS[name]
    answer = read([text.replace("WRITTEN", written)], form_of(spelling), spelling)
    assert shown(answer)[2] == [("weather", {"city": city})]
    answer.calls[0].arguments.encode()
