"""What an engine is: the border between HTTP and generation.

HTTP calls `submit`, `cancel` and `stats`, and nothing else; an engine knows token ids, not text, HTTP or
chat templates. Start at `Engine`.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled"]


class Mask(Protocol):
    """Says at each place of one answer which tokens may come; called from the engine's thread."""

    def allowed(self) -> bytes:
        """Return one byte a token, 0 where it may not come; tokens beyond its end may not either."""
        ...

    def take(self, token: int) -> None:
        """Go on behind `token`, one of those allowed."""
        ...


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form one answer must have: said in words for engines that compile it, and compiled."""

    kind: Literal["schema", "regex"]
    value: Any
    """A JSON schema as a mapping, or a regular expression."""
    begin: Callable[[], Mask]
    """Makes the mask of one answer."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy, and then only the penalties matter."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen (CTRL, arXiv:1909.05858, 4.1)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits, by token id."""
    seed: int | None = None
    """Same seed, prompt and settings, same text, whoever else is served beside it."""
    stop_ids: frozenset[int] = frozenset()
    """Token ids that end the answer; they are not part of it."""
    min_new_tokens: int = 0
    """Stop ids are not chosen before this many tokens."""
    grammar: Grammar | None = None
    """The form of the answer; None lets every token come."""
    top_logprobs: int | None = None
    """Alternatives reported per token; None reports no log probabilities at all."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. `adapter` None is the base model."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    id: str = ""
    """For logs and `cancel`; unique among requests in flight."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a request began to be answered."""

    queued_s: float
    """Time it waited for a row."""
    cached_tokens: int
    """Prompt tokens whose keys and values were in the cache already."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, or the end of the answer (`id` None, `finish_reason` set)."""

    id: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    """Natural log of its probability under the model, before temperature and truncation."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest (token id, log probability) pairs at this place, likeliest first."""
    start: Start | None = None
    """With the first item of an answer that got a row, and only there."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot for health, metrics and admission."""

    running: int
    waiting: int
    kv_cache_share: float
    """Occupied part of the key-value cache, 0 to 1."""
    last_progress_s: float
    """time.monotonic() when a token was last produced, or when the engine was last idle."""
    alive: bool
    """False once the engine thread has died."""
    adapters: tuple[str, ...] = ()
    prompt_tokens: int = 0
    """Prompt tokens of all requests that got a row, since the start."""
    cached_tokens: int = 0
    """Those of them that were found in the cache."""
    guessed_tokens: int = 0
    """Tokens guessed ahead of answers."""
    right_tokens: int = 0
    """Those of them that the model chose."""


class Engine(Protocol):
    """Generates for many requests; every method may be called from the event loop and never blocks."""

    context_tokens: int
    """Longest prompt and answer together."""

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request` and return its tokens as they come; closing the iterator cancels it.

        Raises OverloadedError at once when the queue is full, UnknownModelError for an adapter that is
        not resident, UnavailableError when the engine is closed or dead. A failure during generation is
        raised from the iterator.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop `request_id` by the next step; unknown ids are ignored."""
        ...

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Read a checked adapter folder into memory and answer to `name` from then on.

        The one method that blocks, with `remove_adapter`: call it from a thread of its own. ConfigError
        when it does not fit this model.
        """
        ...

    def remove_adapter(self, name: str) -> None:
        """Take no more requests for `name`, wait for those in flight, and forget it."""
        ...

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        ...

    def close(self) -> None:
        """Stop the engine; requests in flight end with `finish_reason` "cancelled"."""
        ...
