"""What reaches a terminal of text that a model or server wrote."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.serving.printable import Printable, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc 日本 😀 שלום", "a\tb\nc 日本 😀 שלום"),
        ("\x1b[31mred\x1b[0m \x1b[?25l\x1b[38;5;1mx", "red x"),
        ("\x9b31mred\x9b0m", "red"),
        ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \x9d52;c;ZXZpbA==\x9cb", "alink b"),
        ("\x1bPdevice\x1b\\a\x1b_application\x1b\\b\x1b^private\x1b\\c\x1bXstring\x1b\\d", "abcd"),
        ("\x1bc\x1b7\x1b(0\x1b#8a", "a"),
        ("one\rtwo\r\n\x08\x00\x07\x7f\x0b\x0c", "onetwo\n"),
        ("\u202egpj.exe\u202c \u2066a\u2069", "gpj.exe a"),
        ("\x1b]0;never ended\nthe rest", "\nthe rest"),
        ("\x1b]0;title\x1b[31mred", "red"),
        ("\x1b[31\nnext", "\nnext"),
        ("half \ud83d of a pair", "half \ufffd of a pair"),
        ("a\x1b", "a"),
    ],
)
def test_sequences_are_removed(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_an_endless_control_string_does_not_hide_the_answer() -> None:
    assert printable("\x1b]0;" + "x" * 5000).endswith("x" * 900)
    pieces = Printable()
    assert "".join(map(pieces.feed, ["\x1b]0;", *["x"] * 5000])).count("x") >= 900


PARTS = ["\x1b", "[", "]", "0", ";", "m", "P", "\\", "\x07", "\x9b", "\x9c", "\x9d", "\n", "a", "(", "é"]


@given(st.lists(st.sampled_from(PARTS), max_size=30))
def test_pieces_are_shown_as_the_whole(parts: list[str]) -> None:
    text = "".join(parts)
    pieces = Printable()
    shown = "".join(map(pieces.feed, text))
    whole = printable(text)
    assert whole.startswith(shown) or shown == whole
    assert not set(shown) & {"\x1b", "\x9b", "\x9c", "\x9d", "\x07"}
