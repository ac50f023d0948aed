"""Log probabilities as OpenAI's routes write them: of chat completions, completions and responses.

A token that is part of a character has no text: its bytes are written out. Does not know routes or how tokens
are chosen. Start at `Logprobs.chat`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.serving.token_bytes import AnswerToken
from runtime.serving.tokenizer import PromptTokenizer


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The JSON of tokens with their log probabilities, with the alternatives' texts from `tokenizer`."""

    tokenizer: PromptTokenizer

    def chat(self, tokens: Sequence[AnswerToken]) -> list[dict[str, Any]]:
        """Return the entries of chat completions."""
        return [
            {
                **self._entry(sent.token.id, sent.data, sent.token.logprob),
                "top_logprobs": [
                    self._entry(other, self.tokenizer.token_bytes(other), logprob)
                    for other, logprob in sent.token.top
                ],
            }
            for sent in tokens
            if sent.token.id is not None
        ]

    def response(self, tokens: Sequence[AnswerToken]) -> list[dict[str, Any]]:
        """Return the entries of responses, whose clients expect a list of bytes for every token."""
        return [entry | {"bytes": entry["bytes"] or []} for entry in self.chat(tokens)]

    def completion(self, tokens: Sequence[AnswerToken]) -> dict[str, Any]:
        """Return the object of completions; each token is among its own alternatives."""
        return {
            "tokens": [self._key(sent.token.id, sent.data) for sent in tokens],
            "token_logprobs": [None if _is_first(sent) else finite(sent.token.logprob) for sent in tokens],
            "top_logprobs": [None if _is_first(sent) else self._alternatives(sent) for sent in tokens],
            "text_offset": [sent.offset for sent in tokens],
        }

    def _alternatives(self, sent: AnswerToken) -> dict[str, float]:
        chosen = self._key(sent.token.id, sent.data)
        found: dict[str, float] = {}
        for other, logprob in sent.token.top:
            same = other == sent.token.id
            # of several tokens with one text the likeliest
            found.setdefault(
                chosen if same else self._key(other, self.tokenizer.token_bytes(other)), finite(logprob)
            )
        return found if chosen in found else found | {chosen: finite(sent.token.logprob)}

    def _entry(self, token: int, data: bytes | None, logprob: float | None) -> dict[str, Any]:
        text = _text(data) if data is not None else None
        if text is None:
            text = self.tokenizer.token_text(token) if data is None else _escaped(data)
        return {"token": text, "logprob": finite(logprob), "bytes": None if data is None else list(data)}

    def _key(self, token: int | None, data: bytes | None) -> str:
        if data is None:
            return self.tokenizer.token_text(token) if token is not None else ""
        text = _text(data)
        return text if text is not None else "bytes:" + _escaped(data)


def _is_first(sent: AnswerToken) -> bool:
    """Whether a token is the first of a prompt, which follows none."""
    return sent.token.logprob is None


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _escaped(data: bytes) -> str:
    """Return bytes that are no text as OpenAI writes them."""
    return "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float | None) -> float:
    """Return a log probability that JSON can hold; -9999 stands for impossible, as it does at OpenAI."""
    return max(logprob, -9999.0) if logprob is not None else -9999.0
