"""What an engine is: the border between HTTP and generation.

`Engine` is all that HTTP, loading and checks call or read of one; an engine knows token ids, not text, HTTP
or chat templates. Start at `Engine`.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled"]

GREEDY_BELOW = 1e-5
"""A temperature below this always takes the likeliest token, as in vLLM; logits divided by it overflow."""

JSON_STYLE: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""How answers spell JSON, in llguidance's words: one spelling, Python's, which models have seen most; free
white space lets a weak model go on for ever."""


class Mask(Protocol):
    """Which tokens one answer may continue with; called from the engine's thread."""

    def allowed(self) -> bytes:
        """Return one byte per token id, 0 where it is not allowed; ids beyond its end are not either."""
        ...

    def take(self, token: int) -> None:
        """Advance by `token`, one of those allowed."""
        ...


@dataclass(frozen=True, slots=True)
class Constraint:
    """What one answer must match, and the field of the request that asks for it."""

    kind: Literal["schema", "regex", "grammar", "answer"]
    value: Any
    """A JSON schema as a mapping, a regular expression, or a grammar in Lark's or llama.cpp's notation; of an
    answer a mapping with `top`, a grammar without its rules part0 and so on, and `parts`, which are these."""
    param: str
    strict: bool = False
    """Refuse what of a schema cannot be enforced, rather than relax it."""
    whitespace: str | None = None
    """Of a schema: a pattern for the white space between its parts; None is a fixed style."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint, for engines that compile it themselves, and compiled."""

    constraint: Constraint
    begin: Callable[[], Mask]
    """Makes the mask of one answer."""
    relaxed: tuple[str, ...] = ()
    """Paths inside a schema whose keyword is not enforced."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy, and then only penalties and bans matter."""

    max_new_tokens: int
    """0 runs the prompt alone."""
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
    """Same seed, prompt and settings give the same text, whatever else is served beside it."""
    stop_ids: frozenset[int] = frozenset()
    """Token ids that end the answer; they are not part of it."""
    min_new_tokens: int = 0
    """Stop ids are not chosen before this many tokens."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens occurs twice in prompt and answer; 0 allows all."""
    bad_words_ids: Sequence[Sequence[int]] = ()
    """Sequences of tokens that the answer does not complete, also after the end of the prompt."""
    bad_words: Sequence[str] = ()
    """The texts whose spellings `bad_words_ids` are, for an engine that takes texts."""
    suppress_tokens: Sequence[int] = ()
    """Token ids that are never chosen."""
    begin_suppress_tokens: Sequence[int] = ()
    """Token ids that are not chosen first."""
    allowed_token_ids: Sequence[int] | None = None
    """The only token ids that are chosen; None allows all."""
    forced_eos_token_id: Sequence[int] = ()
    """Of these one is chosen where `max_new_tokens` leaves one token."""
    grammar: Grammar | None = None
    """The constraint on the answer; None allows every token."""
    top_logprobs: int | None = None
    """Alternatives reported per token; None reports no log probabilities at all."""
    prompt_logprobs: bool = False
    """Report the prompt's tokens in the same way: none of them is taken from the prefix cache."""

    def __post_init__(self) -> None:
        """Make the smallest temperatures 0."""
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. `adapter` None is the base model."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    id: str = ""
    """For logs and `cancel`; unique among requests in flight."""
    client: str = ""
    """For whom; clients take turns in the queue."""


@dataclass(frozen=True, slots=True)
class Start:
    """What happened before the first token of an answer."""

    queued_s: float
    """Time it waited in the queue."""
    cached_tokens: int
    """Prompt tokens whose keys and values were in the cache."""
    prompt: "tuple[Token, ...]" = ()
    """The prompt's tokens, where their log probabilities are wanted; the first has none."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, or the end of the answer (`id` None, `finish_reason` set)."""

    id: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    """Natural log of its probability under the model, before temperature and truncation."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest (token id, log probability) pairs for this token, likeliest first."""
    start: Start | None = None
    """With the first item of an answer that the engine began, and only there."""
    stop_id: int | None = None
    """With the end: the stop id that was chosen, which `logprob` and `top` are then of."""


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
    """Prompt tokens of all requests that the engine began, since the start."""
    cached_tokens: int = 0
    """Those of them that were found in the cache."""
    drafted_tokens: int = 0
    """Draft tokens that were run, since the start."""
    accepted_tokens: int = 0
    """Those of them that the model chose too."""
    max_sequences: int = 1
    """Sequences that are generated at the same time, at most."""
    cache_tokens: int = 0
    """Positions of the key-value cache, all sequences together; 0 while it is not known."""
    out_of_memory: Mapping[str, int] = field(default_factory=dict)
    """How often memory ran out, by what it ran out for, since the start."""
    preemptions: int = 0
    """How often a sequence gave up its room and was computed again, since the start."""
    prompt_tokens_limit: int = 0
    """Prompt tokens that a pass is limited to since memory ran out; 0 without such a limit."""
    max_requests: int = 0
    """Requests that it takes at a time, answered and waiting; 0 where that is not known."""
    replicas: int = 1
    """Copies of the model, whose figures these are together."""


class Engine(Protocol):
    """Generates for many requests. May be called from any thread; `submit` from the event loop that reads.

    Nothing blocks but `add_adapter`, `remove_adapter` and `close`: call those from a thread of their own.
    """

    context_tokens: int
    """Longest prompt and answer together."""
    max_sequences: int
    """Requests answered at the same time (the setting `limits.rows`, or fewer where memory allows fewer)."""

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request` and return its tokens as they come; closing the iterator cancels it.

        Raises OverloadedError at once when the queue is full, UnknownModelError for an adapter that is
        not loaded, UnavailableError when the engine is closed or dead. A failure during generation is
        raised from the iterator.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop `request_id` by the next step; unknown ids are ignored."""
        ...

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Read a checked adapter folder into memory; requests may name `name` from then on.

        Raises ConfigError when it does not fit this model or the name is in use, CapacityError when there is
        no memory for it.
        """
        ...

    def remove_adapter(self, name: str) -> None:
        """Take no more requests for `name`, wait for those in flight, and remove it from memory."""
        ...

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        ...

    def close(self) -> None:
        """Stop the engine; requests in flight end with `finish_reason` "cancelled"."""
        ...

    def abort(self) -> None:
        """Give up, as a process that the engine needs has ended; requests in flight get UnavailableError."""
        ...
