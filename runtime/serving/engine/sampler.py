"""The host's part of choosing one request's tokens: what it has so far, its constraint and its bans.

`Sampler.row` says what the next choice has to obey, sampling.py chooses, and `Sampler.take` appends what was
chosen. Does not know logits, batches or devices. Start at `Sampler`.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Sampling, Token
from runtime.serving.engine.random_streams import key_of
from runtime.serving.engine.token_bans import Bans, TokenBans

NO_BANS = Bans()


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for one row."""

    token: int | None
    """None where the request allows no token, or the logits are not finite."""
    finite: bool = True
    """Whether all of the logits are."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    again: bool = False
    """Whether the device had another token for it at first."""


@dataclass(frozen=True, slots=True)
class Row:
    """A token to choose, and what the host knows of it."""

    sampler: "Sampler"
    position: int
    """Tokens of the answer before it, `supposed` ones included."""
    supposed: tuple[int, ...] = ()
    """Draft tokens before it, which count only if each of them is chosen."""
    bans: Bans = NO_BANS
    mask: bytes | None = None
    """Of its constraint, as `Mask.allowed` returns it."""
    waits: bool = False
    """Whether it can only be chosen once `supposed` is taken; until then its logits need only be finite."""
    failure: Exception | None = None
    """Why its constraint or its bans could not be worked out; what is chosen then is not taken."""

    @property
    def is_plain(self) -> bool:
        """Whether it takes the likeliest token, and nothing else is wanted."""
        return self.sampler.takes_likeliest and self.bans is NO_BANS


class SeenTokens:
    """The tokens of one prompt and its answer, and how often the answer has each."""

    __slots__ = ("columns", "counts", "ids", "taken")

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self.ids = array("q", dict.fromkeys(prompt_ids))
        self.counts = array("q", bytes(8 * len(self.ids)))
        self.columns = {token: column for column, token in enumerate(self.ids)}
        """Where in `ids` and `counts` a token is."""
        self.taken = 0
        """Tokens of the answer that are counted."""

    def follow(self, generated: Sequence[int]) -> None:
        """Count what is new in `generated`, the whole answer so far."""
        for token in generated[self.taken :]:
            column = self.columns.setdefault(token, len(self.ids))
            if column == len(self.ids):
                self.ids.append(token)
                self.counts.append(0)
            self.counts[column] += 1
        self.taken = len(generated)

    def copy(self) -> "SeenTokens":
        """Return a copy that is counted on by itself."""
        other = SeenTokens(())
        other.ids, other.counts, other.columns = self.ids[:], self.counts[:], dict(self.columns)
        other.taken = self.taken
        return other


class Sampler:
    """The sampling state of one request: its prompt, what was generated, and its stream of random numbers."""

    def __init__(self, sampling: Sampling, prompt_ids: tuple[int, ...]) -> None:
        self.sampling, self.prompt_ids = sampling, prompt_ids
        self.generated: list[int] = []
        self.key = key_of(sampling.seed)
        self.takes_likeliest = _takes_likeliest(sampling)
        """Whether it takes the likeliest token wherever there are no bans, and reports nothing else."""
        self.full_rankings = 0
        """For how many more tokens the whole vocabulary is ranked at once: the shortlist was too short."""
        self.seen: SeenTokens | None = None
        """The tokens that penalties count, once they are counted."""
        self._mask = sampling.grammar.begin() if sampling.grammar is not None else None
        self._bans = TokenBans(sampling, prompt_ids) if TokenBans.needed(sampling) else None

    def row(self, supposed: tuple[int, ...] = ()) -> Row:
        """Return the next token to choose, after `supposed` draft tokens; what fails is in it."""
        position = len(self.generated) + len(supposed)
        if supposed and self._mask is not None:  # which cannot take a token back
            return Row(self, position, supposed, waits=True)
        try:
            bans = self._next_bans(supposed, early=position < self.sampling.min_new_tokens)
            mask = self._mask.allowed() if self._mask is not None else None
        except Exception as error:  # of this request alone: raised where its token is taken
            return Row(self, position, supposed, failure=error)
        return Row(self, position, supposed, bans, mask)

    def take(self, row: Row, choice: Choice) -> Token:
        """Append what was chosen for `row` of finite logits.

        Raises RequestError when the request allows no token at all, and what failed in `row`.
        """
        if row.failure is not None:
            raise row.failure
        token = choice.token
        if token is None:
            raise RequestError("no token is left that this request allows: its bans exclude all of them")
        self.generated.append(token)
        self.full_rankings = max(0, self.full_rankings - 1)
        if self._bans is not None:
            self._bans.push(token)
        if self._mask is not None:
            self._mask.take(token)
        return Token(token, logprob=choice.logprob, top=choice.top)

    def _next_bans(self, supposed: tuple[int, ...], *, early: bool) -> Bans:
        """Return the bans after `supposed`; the answer may not end yet while it is `early`."""
        ends = self.sampling.stop_ids if early else frozenset()
        if self._bans is None and not ends:
            return NO_BANS
        bans = Bans()
        if self._bans is not None:
            bans = (self._bans.after(supposed) if supposed else self._bans).next()
        ids = torch.tensor(sorted(ends), dtype=torch.long)
        return Bans((*bans.banned, ids), bans.only, bans.equal)


def _takes_likeliest(sampling: Sampling) -> bool:
    """Return whether `sampling` takes the likeliest token and reports nothing else, bans aside."""
    changed = (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
        or sampling.grammar is not None
    )
    return sampling.temperature == 0 and sampling.top_logprobs is None and not changed
