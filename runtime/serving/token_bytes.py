"""Each token's part of an answer, in bytes: a token may end within a character, and then has no text.

Tokenizers only tell the text of several tokens together. Here their spelling of bytes is read: that of byte
level (GPT-2's letters for bytes), and that of sentencepiece ("▁" for a space, "<0xE6>" for a byte). Does not
know answers' JSON or log probabilities. Start at `AnswerTokens.push`.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from runtime.serving.detokenize import UNFINISHED
from runtime.serving.engine.protocol import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_AS_THEMSELVES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(0x100) if byte not in _AS_THEMSELVES)
BYTE_LETTERS = {chr(byte): byte for byte in _AS_THEMSELVES} | {
    chr(0x100 + n): byte for n, byte in enumerate(_OTHERS)
}
"""The letters that stand for bytes in the vocabularies of byte-level tokenizers (GPT-2's table)."""


class TokenBytes:
    """The bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        decoder = json.loads(tokenizer.backend_tokenizer.decoder.__getstate__())
        parts = decoder.get("decoders", [decoder])
        self._kinds = {part["type"] for part in parts}

    def __call__(self, token: int) -> bytes:
        """Return the bytes of `token`, with its leading space; of a special token those of its name."""
        if token in self._added:
            return self._added[token].encode()
        piece: Any = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the embedding that the vocabulary does not use
            return b""
        if "ByteLevel" in self._kinds and all(letter in BYTE_LETTERS for letter in piece):
            return bytes(BYTE_LETTERS[letter] for letter in piece)
        if "ByteFallback" in self._kinds and (byte := _BYTE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        if self._kinds & {"Replace", "Metaspace"}:
            return str(piece).replace("\u2581", " ").encode()
        return str(self._tokenizer.decode([token])).encode()


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """A token of an answer, and its part of the text."""

    token: Token
    data: bytes | None
    """Its bytes of the text; None for one that the text leaves out."""
    offset: int
    """Characters of the text before the one that it begins with, or goes on with."""


class AnswerTokens:
    """Gives out the tokens of one answer as their text is sent."""

    def __init__(self, bytes_of: Callable[[int], bytes], left_out: frozenset[int] = frozenset()) -> None:
        """`left_out` are the special tokens that the text does not show."""
        self._bytes_of = bytes_of
        self._left_out = left_out
        self._group: list[Token] = []  # tokens whose text is not known yet
        self._waiting: deque[tuple[AnswerToken, int]] = deque()  # with where each one's text ends
        self._decoded = self._sent = 0

    def push(self, token: Token | None, decoded: str, *, sent: int) -> tuple[AnswerToken, ...]:
        """Take a token, the text that it completed, and how many characters were sent now.

        Returns the tokens that were sent with this. `token` is None at the end of the answer.
        """
        if token is not None:
            self._group.append(token)
        if decoded or token is None:
            self._divide(decoded)
        self._sent += sent
        return self._take(lambda _, end: end <= self._sent)

    def cut(self) -> tuple[AnswerToken, ...]:
        """Return the tokens with a part in what was sent, for an answer that ends there."""
        return self._take(lambda start, _: start < self._sent)

    def end(self, token: Token) -> AnswerToken:
        """Return the token that ended the answer, which has no text; after the last `push`."""
        return AnswerToken(token, None, self._decoded)

    def _take(self, belongs: Callable[[int, int], bool]) -> tuple[AnswerToken, ...]:
        taken = []
        while self._waiting and belongs(self._waiting[0][0].offset, self._waiting[0][1]):
            taken.append(self._waiting.popleft()[0])
        return tuple(taken)

    def _divide(self, text: str) -> None:
        """Divide `text` among the tokens of the group."""
        end, begun = self._decoded + len(text), 0
        for token, part in zip(self._group, self._spelled(text), strict=True):
            within = bool(part) and begun > 0 and part[0] & 0xC0 == 0x80
            start, begun = begun, begun + sum(byte & 0xC0 != 0x80 for byte in part)
            shown = None if token.id in self._left_out else part
            offset = min(self._decoded + start - within, end)
            self._waiting.append((AnswerToken(token, shown, offset), end))
        self._group, self._decoded = [], end

    def _spelled(self, text: str) -> list[bytes]:
        """Return the bytes of each token of the group, which together are `text`."""
        encoded = text.encode()
        ids = [token.id for token in self._group]
        parts = [b"" if id_ is None or id_ in self._left_out else self._bytes_of(id_) for id_ in ids]
        joined = b"".join(parts)
        if joined.endswith(encoded):
            surplus = len(joined) - len(encoded)  # the space that sentencepiece drops at the beginning
            for n, part in enumerate(parts):
                parts[n], surplus = part[surplus:], max(0, surplus - len(part))
        elif (
            UNFINISHED not in text
        ):  # a tokenizer with rules of its own: nobody knows which token is which part
            parts = [b"" for _ in parts[1:]] + [encoded for _ in parts[:1]]
        return parts


def prompt_tokens(
    tokens: Sequence[Token], text: str, bytes_of: Callable[[int], bytes], *, special: frozenset[int]
) -> Sequence[AnswerToken]:
    """Return the tokens of a prompt, each with its part of `text`, in which `special` ones may be missing."""
    spelled = b"".join(bytes_of(token.id) for token in tokens if token.id is not None)
    # a tokenizer puts its opening tokens before a text that does not have them
    left_out = frozenset() if spelled.endswith(text.encode()) else special
    divided = AnswerTokens(bytes_of, left_out)
    for token in tokens:
        divided.push(token, "", sent=0)
    parts = divided.push(None, text, sent=len(text))
    unseen = [not part.data and part.token.id in special for part in parts]
    return [replace(part, data=None) if none else part for part, none in zip(parts, unseen, strict=True)]
