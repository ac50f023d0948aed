"""Patterns of JSON Schema against Python's own reading of them."""

import re
from collections.abc import Callable

import pytest

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
