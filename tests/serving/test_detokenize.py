"""Text is complete: no half characters, no stop strings, nothing lost."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serving.detokenize import Detokenizer, StopScanner, TextStream

TEXTS = [
    "plain words",
    "naïve café",
    "emoji 🦜🦜 end",
    "中文字符和日本語",
    "👩‍👩‍👧‍👦 family",
    "  spaces  \n\n tabs\t",
]


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_are_whole_characters_and_join_to_the_text(tokenizer: Any, text: str) -> None:
    stream = Detokenizer(tokenizer.decode)
    chunks = [stream.push(token) for token in tokenizer.encode(text)]
    assert all("\ufffd" not in chunk for chunk in chunks)
    assert "".join(chunks) + stream.flush() == text


def test_emoji_appears_only_with_its_last_token(tokenizer: Any) -> None:
    stream = Detokenizer(tokenizer.decode)
    assert [stream.push(token) for token in tokenizer.encode("🦜")] == ["", "", "", "🦜"]


def test_unfinished_character_is_shown_at_the_end(tokenizer: Any) -> None:
    stream = Detokenizer(tokenizer.decode)
    for token in tokenizer.encode("a🦜")[:-1]:
        stream.push(token)
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_endless_noise_is_shown_and_not_kept(tokenizer: Any) -> None:
    lone = tokenizer.encode("é")[1]  # a continuation byte without its first one
    stream = Detokenizer(tokenizer.decode)
    shown = "".join(stream.push(lone) for _ in range(64))
    assert len(shown) >= 56


def test_leading_space_survives_after_a_prompt() -> None:
    """Sentencepiece drops the space of a first token; after a prompt it must stay."""
    words = {1: "Hello", 2: " world"}

    def decode(ids: Any) -> str:
        return "".join(words[i] for i in ids).removeprefix(" ")

    assert Detokenizer(decode).push(2) == "world"
    assert Detokenizer(decode, tail=[1]).push(2) == " world"


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), cut=st.integers(0, 40))
def test_any_text_survives_with_any_prompt_before_it(tokenizer: Any, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    stream = Detokenizer(tokenizer.decode, tail=ids[:cut][-6:])
    before = tokenizer.decode(ids[:cut])
    if "\ufffd" in before:
        return
    shown = "".join(stream.push(token) for token in ids[cut:]) + stream.flush()
    assert before + shown == tokenizer.decode(ids)


def test_stop_string_across_chunks_is_never_shown() -> None:
    scanner = StopScanner(["STOP"])
    assert scanner.push("go S") == ("go ", False)
    assert scanner.push("TO") == ("", False)
    assert scanner.push("P now") == ("", True)


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    scanner = StopScanner(["STOP", "\n\n"])
    assert scanner.push("ST") == ("", False)
    assert scanner.push("ART\n") == ("START", False)
    assert scanner.flush() == "\n"


def test_earliest_of_several_stop_strings_wins() -> None:
    assert StopScanner(["c", "ab"]).push("xabc") == ("x", True)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=30),
    stop=st.text(alphabet="ab", min_size=1, max_size=4),
    size=st.integers(1, 5),
)
def test_stop_string_is_found_however_the_text_is_cut(text: str, stop: str, size: int) -> None:
    scanner, shown, met = StopScanner([stop]), "", False
    for at in range(0, len(text), size):
        chunk, met = scanner.push(text[at : at + size])
        shown += chunk
        if met:
            break
    if not met:
        shown += scanner.flush()
    assert met == (stop in text)
    assert shown == text.split(stop, maxsplit=1)[0]


def test_stop_string_in_the_last_unfinished_text_is_met(tokenizer: Any) -> None:
    stream = TextStream(tokenizer.decode, stops=["\ufffd"])
    stream.push(tokenizer.encode("🦜")[0])
    assert stream.finish() == ("", True)
