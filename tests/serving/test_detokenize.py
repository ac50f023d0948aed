"""Text is complete: no half characters, no stop strings, nothing lost."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serving.answer_parsers.forms import AnswerForm
from runtime.serving.answer_parsers.parts import ParsedAnswer
from runtime.serving.answer_text import AnswerText, PromptEnd
from runtime.serving.detokenize import Detokenizer, StopRules, StopScanner
from tests.serving.conftest import make_sentencepiece, make_tokenizer

KINDS = {
    "byte level": make_tokenizer,
    "sentencepiece": lambda: make_sentencepiece(strips=False),
    "sentencepiece without the first space": lambda: make_sentencepiece(strips=True),
}
NOISE = re.compile("\ufffd+")

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


@settings(max_examples=60)
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


@settings(max_examples=200)
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
    assert content(tokenizer.decode, tokenizer.encode("🦜")[:1], StopRules(["\ufffd"])) == ("", True)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    """A tokenizer of each kind."""
    return KINDS[request.param]()


NO_STOPS = StopRules()
SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def content(decode: Any, ids: Sequence[int], stops: StopRules, **options: Any) -> tuple[str, bool]:
    """Return the content of an answer, and whether a stop string ended it."""
    text = AnswerText(decode, AnswerForm(), **{"stops": stops, "special": SPECIAL, **options})
    answer = ParsedAnswer()
    for token in ids:
        parts, met = text.push(token)
        answer.add(parts)
        if met:
            return answer.content, True
    parts, met = text.finish()
    answer.add(parts)
    return answer.content, met


def shown(tokenizer: Any, ids: list[int], stops: StopRules = NO_STOPS, **options: Any) -> str:
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return content(decode, ids, stops, **options)[0]


@settings(max_examples=100)
@given(text=st.text(alphabet="the word is an日é🦜🇩\u200d\ufffd \n\x00", max_size=30))
def test_any_text_survives_in_every_kind_of_tokenizer(kind: Any, text: str) -> None:
    ids = kind.encode(text, add_special_tokens=False)
    assert shown(kind, ids) == kind.decode(ids)


@settings(max_examples=100)
@given(texts=st.lists(st.text(alphabet="the日é🦜 ", max_size=5), max_size=5))
def test_bytes_that_are_no_utf8_undo_no_character_before_them(kind: Any, texts: list[str]) -> None:
    """Byte fallback makes U+FFFD of all bytes in a row, once it has one among them that is no UTF-8."""
    broken = kind.convert_tokens_to_ids("<0xF3>" if "<0xF3>" in kind.get_vocab() else "ó")
    texts = [f"a{text}" for text in texts]
    encoded = [kind.encode(text, add_special_tokens=False) for text in texts]
    first_space = [kind.decode(ids[:1]) == "" for ids in encoded]
    expected = "".join(
        " " * (space and n > 0) + text + "\ufffd"
        for n, (text, space) in enumerate(zip(texts, first_space, strict=True))
    )
    assert NOISE.sub("?", shown(kind, [id_ for ids in encoded for id_ in (*ids, broken)])) == NOISE.sub(
        "?", expected
    )


def test_many_special_tokens_are_not_kept(tokenizer: Any) -> None:
    lengths: list[int] = []

    def decode(ids: Any) -> str:
        lengths.append(len(ids))
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    stream = Detokenizer(decode)
    text = "".join(stream.push(token) for token in [1] * 100 + tokenizer.encode("a word"))
    assert text + stream.flush() == "a word"
    assert max(lengths) < 20


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=3), max_size=10),
    stop=st.text(alphabet="ab", min_size=1, max_size=4),
    least=st.integers(0, 6),
)
def test_a_stop_string_that_ends_too_early_ends_nothing(pieces: list[str], stop: str, least: int) -> None:
    rules = StopRules([stop], min_tokens=least)
    text, met = content(lambda ids: "".join(pieces[n] for n in ids), range(len(pieces)), rules)
    whole, early = "".join(pieces), len("".join(pieces[:least]))
    ends = [at for at in range(len(whole)) if whole.startswith(stop, at) and at + len(stop) > early]
    assert met == bool(ends)
    assert text == (whole[: ends[0]] if ends else whole)


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        ("<|im_start|>user", "well\n<|im_start|>user\nand", "well\n"),
        ("\n<|im_start|>", "well\n<|im_start|>user", "well"),
        ("<|im_start|>user", "well<|im_start|>system", "wellsystem"),
        ("<|im_start|>user", "user<|im_start|>us", "userus"),
        ("<|im_start|><|endoftext|>", "a<|im_start|>b<|im_start|><|endoftext|>c", "ab"),
        ("ab", "a<|im_start|>b", ""),
    ],
)
def test_a_stop_string_may_hold_special_tokens(tokenizer: Any, stop: str, text: str, expected: str) -> None:
    assert shown(tokenizer, tokenizer.encode(text), StopRules([stop, ""])) == expected


def test_an_included_stop_string_is_shown_to_its_end(tokenizer: Any) -> None:
    ids = tokenizer.encode("one\n<|im_start|>user two")
    rules = StopRules(["\n<|im_start|>us"], included=True)
    assert shown(tokenizer, ids, rules) == "one\n<|im_start|>us"
    assert shown(tokenizer, tokenizer.encode("abcd"), StopRules(["bc"], included=True)) == "abc"


def test_a_stop_string_sees_the_first_space_where_the_text_has_it() -> None:
    tokenizer = make_sentencepiece(strips=True)
    ids, rules = tokenizer.encode("word is", add_special_tokens=False), StopRules([" word"])
    assert shown(tokenizer, ids, rules) == "word is", "the answer of a conversation begins without it"
    assert shown(tokenizer, ids, rules, prompt=PromptEnd(ids[-1:])) == ""
