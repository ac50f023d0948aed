"""Tokens that a request forbids: some always, some by what came before them.

The meanings are those of transformers' generate. Costs nothing for requests that forbid nothing, and per
token a few passes over the ids of the sequence for those that forbid repeated n-grams. Works on the host:
does not know logits or batches. Start at `TokenBans.next`.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.serving.engine.protocol import Sampling

_ZERO = torch.zeros(1, dtype=torch.int32)


class RepeatedNgrams:
    """Which tokens would complete a run of `size` tokens that occurred before."""

    def __init__(self, size: int, ids: Sequence[int]) -> None:
        self._size = size
        self._ids = torch.tensor(ids, dtype=torch.int32)
        self._matching = self._matching_at_first()
        # (n - 1,): how many tokens up to each position equal the newest ones

    def _matching_at_first(self) -> Tensor:
        ids, last = self._ids, len(self._ids) - 1
        matching = torch.zeros(max(last, 0), dtype=torch.int32)
        places = torch.arange(max(last, 0))
        for back in range(min(self._size - 1, last)):
            places = places[places >= back]
            places = places[ids[places - back] == ids[last - back]]
            if not len(places):
                break
            matching[places] = back + 1
        return matching

    def push(self, token: int) -> None:
        """Append `token` to the sequence."""
        longer = torch.cat((_ZERO, self._matching)).add_(1)
        self._matching = longer.mul_(self._ids == token)
        self._ids = torch.cat((self._ids, torch.tensor([token], dtype=torch.int32)))

    def completing(self) -> Tensor:
        """Return the ids of these tokens, some more than once."""
        if self._size == 1:
            return self._ids.long()
        return self._ids[1:][self._matching >= self._size - 1].long()


class BadWords:
    """Which tokens would complete one of some sequences of tokens."""

    def __init__(self, words: Sequence[Sequence[int]], ids: Sequence[int]) -> None:
        self._by_end: dict[int, list[tuple[list[int], int]]] = {}
        for *before, last in words:
            if before:
                self._by_end.setdefault(before[-1], []).append((before, last))
        self._longest = max((len(word) for word in words), default=1) - 1
        self._recent = list(ids[-self._longest :]) if self._longest else []

    def push(self, token: int) -> None:
        """Append `token` to the sequence."""
        self._recent = [*self._recent, token][-self._longest :] if self._longest else []

    def completing(self) -> list[int]:
        """Return the ids of these tokens; words of one token are not among them."""
        recent = self._recent
        if not recent:
            return []
        return [last for before, last in self._by_end.get(recent[-1], ()) if recent[-len(before) :] == before]


@dataclass(frozen=True, slots=True)
class Bans:
    """What may not be one next token; ids that the model does not have may be among them."""

    banned: tuple[Tensor, ...] = ()
    """Ids, some more than once."""
    only: tuple[Tensor, ...] = ()
    """What is outside any of these is banned too."""
    equal: bool = False
    """Whether what is left is equally likely, whatever the logits say."""


class TokenBans:
    """What one request forbids, and the tokens it has so far."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self._most, self._generated = sampling.max_new_tokens, 0
        # as in transformers, a bad word does not forbid to end the answer
        single = {word[0] for word in sampling.bad_words_ids if len(word) == 1} - sampling.stop_ids
        self._always = _ids(sorted(single.union(sampling.suppress_tokens)))
        self._at_first = _ids(sampling.begin_suppress_tokens)
        self._at_last = _ids(sampling.forced_eos_token_id)
        self._allowed = None if sampling.allowed_token_ids is None else _ids(sampling.allowed_token_ids)
        self._words = BadWords(sampling.bad_words_ids, prompt_ids)
        size = sampling.no_repeat_ngram_size
        self._ngrams = RepeatedNgrams(size, prompt_ids) if size else None

    @staticmethod
    def needed(sampling: Sampling) -> bool:
        """Return whether `sampling` forbids any token, ends before `min_new_tokens` aside."""
        return bool(
            sampling.no_repeat_ngram_size
            or sampling.bad_words_ids
            or sampling.suppress_tokens
            or sampling.begin_suppress_tokens
            or sampling.forced_eos_token_id
            or sampling.allowed_token_ids is not None
        )

    def push(self, token: int) -> None:
        """Append `token`, which was chosen."""
        self._generated += 1
        self._words.push(token)
        if self._ngrams is not None:
            self._ngrams.push(token)

    def after(self, tokens: Iterable[int]) -> "TokenBans":
        """Return what would be forbidden after `tokens`; nothing is appended here."""
        later = copy.copy(self)
        later._words, later._ngrams = copy.copy(self._words), copy.copy(self._ngrams)
        for token in tokens:
            later.push(token)
        return later

    def next(self) -> Bans:
        """Return what may not come next."""
        banned = [self._always, _ids(self._words.completing())]
        if self._ngrams is not None:
            banned.append(self._ngrams.completing())
        if self._generated == 0:
            banned.append(self._at_first)
        ends = len(self._at_last) > 0 and self._generated == self._most - 1
        only = [self._at_last] if ends else []
        if self._allowed is not None:
            only.append(self._allowed)
        return Bans(tuple(ids for ids in banned if len(ids)), tuple(only), equal=ends)


def _ids(ids: Sequence[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.long)
