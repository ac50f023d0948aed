"""The JSON of answers on the OpenAI routes: choices, whole and in chunks, with log probabilities and calls.

Knows pieces of text and tokens; does not know requests or how they are generated. Start at `Chat`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.serving.answers import Piece, Whole
from runtime.serving.engine.protocol import Token
from runtime.serving.prompts import Prompts
from runtime.serving.tools import Call, ToolStream, split


@dataclass(frozen=True, slots=True)
class Chat:
    """The JSON of chat completions."""

    prompts: Prompts
    logprobs: bool
    tools: frozenset[str] = frozenset()
    calling: dict[int, ToolStream] = field(default_factory=dict)
    """Answers in which a call may hide, by their index."""
    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, index: int, whole: Whole) -> dict[str, Any]:
        """Return one choice of a complete answer."""
        text, calls = split(whole.text, self.tools) if self.tools else (whole.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.as_json() for call in calls]}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(whole.tokens),
            "finish_reason": "tool_calls" if calls else whole.finish,
        }

    def first(self, index: int) -> list[dict[str, Any]]:
        """Return the chunk that opens an answer: the role."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunks of one piece: text, then how it ended in a chunk of its own."""
        text, finish, calls = piece.text, str(piece.finish or ""), list[Call]()
        if self.tools:
            stream = self.calling.setdefault(index, ToolStream(self.tools))
            text = stream.push(text)
            if finish:
                rest, calls = stream.finish()
                text, finish = text + rest, "tool_calls" if calls else finish
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        deltas: list[tuple[dict[str, Any], Any, str | None]] = []
        if text or logprobs:
            deltas.append(({"content": text}, logprobs, None))
        if calls:
            deltas.append(({"tool_calls": [call.as_json(i) for i, call in enumerate(calls)]}, None, None))
        if finish:
            deltas.append(({}, None, finish))
        return [
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            for delta, logprobs, reason in deltas
        ]

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {
                **self._scored(token.id, token.logprob),
                "top_logprobs": [self._scored(other, logprob) for other, logprob in token.top],
            }
            for token in tokens
            if token.id is not None
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.prompts.token_text(token)
        # Part of a character has no text of its own; OpenAI's `bytes` is null where it is not known.
        known = list(text.encode()) if "\ufffd" not in text else None
        return {"token": text, "logprob": finite(logprob), "bytes": known}


@dataclass(frozen=True, slots=True)
class Completion:
    """The JSON of completions."""

    prompts: Prompts
    logprobs: int | None
    echoes: Sequence[str]
    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, index: int, whole: Whole) -> dict[str, Any]:
        """Return one choice of a complete answer."""
        text = self.echoes[index] + whole.text
        logprobs = self._logprobs(whole.tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": whole.finish}

    def first(self, index: int) -> list[dict[str, Any]]:
        """Return the chunk that opens an answer: the prompt where `echo` asks for it."""
        text = self.echoes[index]
        return [{"index": index, "text": text, "logprobs": None, "finish_reason": None}] if text else []

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunk of one piece."""
        if not piece.text and not piece.finish and not piece.tokens:
            return []
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return [{"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}]

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        texts = [self.prompts.token_text(token.id) for token in tokens if token.id is not None]
        offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self.prompts.token_text(i): finite(p) for i, p in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }


def finite(logprob: float | None) -> float:
    """Return a log probability that JSON can hold; -9999 stands for impossible, as it does at OpenAI."""
    return max(logprob, -9999.0) if logprob is not None else -9999.0
