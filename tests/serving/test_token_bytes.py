"""Every token has its bytes of the text, whatever the text is cut into."""

from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serving.answer_parsers.forms import AnswerForm
from runtime.serving.answer_parsers.parts import ParsedAnswer, Part
from runtime.serving.answer_text import AnswerText
from runtime.serving.detokenize import StopRules
from runtime.serving.engine.protocol import Token
from runtime.serving.token_bytes import AnswerToken, AnswerTokens, TokenBytes
from tests.serving.conftest import make_sentencepiece, make_tokenizer

KINDS = {
    "byte level": make_tokenizer,
    "sentencepiece": lambda: make_sentencepiece(strips=False),
    "sentencepiece without the first space": lambda: make_sentencepiece(strips=True),
}
TEXT = st.text(alphabet="the word is an日é🦜🇩\u200d \n\x00", max_size=30)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    """A tokenizer of each kind."""
    return KINDS[request.param]()


def sent(kind: Any, ids: list[int], stops: tuple[str, ...] = ()) -> list[tuple[str, tuple[AnswerToken, ...]]]:
    """Return an answer chunk by chunk: its text and the tokens sent with it."""
    decode = partial(kind.decode, skip_special_tokens=True)
    stream = AnswerText(decode, AnswerForm(), stops=StopRules(stops), special={})
    special = frozenset(number for number, token in kind.added_tokens_decoder.items() if token.special)
    tokens = AnswerTokens(TokenBytes(kind), special)
    chunks = []
    for id_ in ids:
        parts, met = stream.push(id_)
        chunks.append((content(parts), tokens.push(Token(id_), stream.decoded, sent=stream.settled)))
        if met:
            return [*chunks, ("", tokens.cut())]
    parts, met = stream.finish()
    chunks.append((content(parts), tokens.push(None, stream.decoded, sent=stream.settled)))
    return [*chunks, ("", tokens.cut())] if met else chunks


def content(parts: list[Part]) -> str:
    answer = ParsedAnswer()
    answer.add(parts)
    return answer.content


@settings(max_examples=150)
@given(text=TEXT)
def test_the_bytes_of_all_tokens_are_the_text(kind: Any, text: str) -> None:
    ids = kind.encode(text, add_special_tokens=False)
    chunks = sent(kind, ids)
    tokens = [token for _, some in chunks for token in some]
    whole = "".join(text for text, _ in chunks)
    assert [each.token.id for each in tokens] == ids
    assert b"".join(each.data or b"" for each in tokens).decode() == whole == kind.decode(ids)


@settings(max_examples=150)
@given(text=TEXT)
def test_a_token_begins_at_its_offset_over_the_whole_answer(kind: Any, text: str) -> None:
    chunks = sent(kind, kind.encode(text, add_special_tokens=False))
    whole, data = "".join(text for text, _ in chunks), b""
    for each in (token for _, some in chunks for token in some):
        begun = data.decode(errors="ignore")
        assert each.offset == len(begun)
        assert whole[: each.offset] == begun
        data += each.data or b""


@settings(max_examples=200)
@given(text=TEXT, at=st.integers(0, 20), length=st.integers(1, 4))
def test_only_tokens_with_a_part_in_what_was_sent_are_reported(
    kind: Any, text: str, at: int, length: int
) -> None:
    ids = kind.encode(text, add_special_tokens=False)
    whole = kind.decode(ids)
    stop = whole[at : at + length]
    chunks = sent(kind, ids, (stop,))
    shown = "".join(text for text, _ in chunks)
    assert shown == (whole.split(stop)[0] if stop else whole)
    tokens = [token for _, some in chunks for token in some]
    data = b"".join(each.data or b"" for each in tokens)
    assert data.startswith(shown.encode())
    if tokens:
        before = data.removesuffix(tokens[-1].data or b"").decode(errors="ignore")
        assert len(before) <= len(shown), "the last one has a part in it"


def test_a_special_token_that_is_left_out_has_no_bytes(tokenizer: Any) -> None:
    chunks = sent(tokenizer, [1, *tokenizer.encode("a"), 1])
    tokens = [token for _, some in chunks for token in some]
    assert [(each.token.id, each.data, each.offset) for each in tokens] == [
        (1, None, 0),
        (tokenizer.encode("a")[0], b"a", 0),
        (1, None, 1),
    ]


def test_bytes_of_tokens_keep_their_space_and_unused_rows_have_none(kind: Any) -> None:
    bytes_of = TokenBytes(kind)
    assert b"".join(
        map(bytes_of, kind.encode("is the word", add_special_tokens=False))
    ).decode().lstrip() == ("is the word")
    assert bytes_of(len(kind) + 7) == b""
