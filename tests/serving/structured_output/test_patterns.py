"""Patterns of JSON Schema against Python's own reading of them."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Constraint
from runtime.serving.structured_output.compiler import GrammarCompiler
from runtime.serving.structured_output.patterns import from_ecma

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("pattern", "translated"),
    [
        (r"\d[\d.]", "[0-9][[0-9].]"),
        (r"a.b", r"a[^\n\r\x{2028}\x{2029}]b"),
        ("[.]", "[.]"),
        ("[^]", r"[\s\S]"),
        ("[]", r"[^\s\S]"),
        (r"\u0041\cA", r"\x{0041}\x01"),
        ("[[&&a~]", r"[\[\&\&a\~]"),
        ("a{,3}{x}{2}{2,}", r"a\{,3}\{x}{2}{2,}"),
        (r"\x{1F600}[\x{4e00}-\x{9FFF}]\u{1f600}", r"\x{1F600}[\x{4e00}-\x{9FFF}]\x{1f600}"),
        (r"\uD83D\uDE00+", r"\x{1F600}+"),
        (r"\U0001F600\x41{2}", r"\U0001F600\x41{2}"),
        (r"\/\-", r"\/\-"),
        (r"\\d", r"\\d"),
        (r"\p{L}+\P{Nd}{2}", r"\p{L}+\P{Nd}{2}"),
    ],
)
def test_ecma_is_translated(pattern: str, translated: str) -> None:
    assert from_ecma(pattern) == translated


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{1,4}",
        r"\w{2}\s",
        r"[^\D5]{2}",
        r"[a-c][\[&]x{2}",
        r"\u0041\x42(?:c|d)?",
        ".{3}",
        r"a\{b\}",
        r"[\w.+-]{1,5}@x\.org",
    ],
)
async def test_answers_match_in_python_too(
    shared_compiler: GrammarCompiler, answers: Callable[..., list[str]], pattern: str
) -> None:
    grammar = await shared_compiler.compile(Constraint("regex", pattern, "guided_regex"))
    written = answers(grammar, seeds=20)
    assert written
    for text in written:
        assert re.fullmatch(pattern, text), text
    assert not any(re.search(r"\d", text) and not re.search("[0-9]", text) for text in written)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\x{1F600}", "\N{GRINNING FACE}"),
        (r"\x{00020000}", "\U00020000"),
        (r"\u{20000}\uD83D\uDE00", "\U00020000\N{GRINNING FACE}"),
        (r"\\{3}[{99999}][\]{99999}]", "\\" * 3 + "{9"),
    ],
)
async def test_digits_in_braces_are_no_count_where_they_are_a_character(
    shared_compiler: GrammarCompiler, answers: Callable[..., list[str]], pattern: str, text: str
) -> None:
    for constraint in (
        Constraint("regex", pattern, "guided_regex"),
        Constraint("schema", {"type": "string", "pattern": f"^{pattern}$"}, "guided_json", strict=True),
    ):
        grammar = await shared_compiler.compile(constraint)
        written = answers(grammar, seeds=3)
        if constraint.kind == "schema":
            written = [json.loads(each) for each in written]
        assert all(len(each) == len(text) and each[:3] == text[:3] for each in written), written


@pytest.mark.parametrize("kind", ["regex", "schema"])
async def test_code_point_beyond_the_last_is_refused_in_words(
    shared_compiler: GrammarCompiler, kind: Any
) -> None:
    pattern = r"a\x{110000}"
    value = pattern if kind == "regex" else {"type": "string", "pattern": pattern}
    with pytest.raises(RequestError, match=r"\\x\{110000\} is no character, the last is 10FFFF"):
        await shared_compiler.compile(Constraint(kind, value, "guided"))


async def test_repetition_behind_an_escaped_backslash_is_counted(shared_compiler: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match=r"repeats \{99999\}, at most 10000 times"):
        await shared_compiler.compile(Constraint("regex", r"\\{99999}", "guided_regex"))
