"""Which replica a request goes to: one that has the beginning of its prompt in the cache, else the idlest.

Knows prompts and counts, not processes. Start at `Dispatcher.choose`.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.serving.engine.protocol import Request

BLOCK_TOKENS = 64
"""Prompts are compared in blocks of so many tokens."""
LEAST_BLOCKS = 1024
MOST_AHEAD = 4
"""Requests that a replica may have in flight above the idlest one and still get one for its cache.

A prompt that is run twice costs less than an answer that shares each step with many others.
"""


@dataclass(slots=True)
class ReplicaLoad:
    """What one replica has to do."""

    max_sequences: int
    requests: int = 0
    """Requests in flight."""
    tokens: int = 0
    """Their prompts' tokens."""
    dispatched: int = 0
    """Requests since the start."""


class Dispatcher:
    """Remembers which replica has run which beginnings of prompts. Not safe to call from two threads."""

    def __init__(self, replicas: Sequence[ReplicaLoad], *, cache_tokens: int) -> None:
        """`cache_tokens` of all caches together bound what is remembered: older beginnings are not there."""
        self._replicas = replicas
        self._most = max(LEAST_BLOCKS, cache_tokens // BLOCK_TOKENS)
        self._seen: OrderedDict[int, int] = OrderedDict()
        """From a hash of the blocks up to one, to a bit for each replica that has run them."""

    def choose(self, request: Request) -> int:
        """Return the replica to answer `request`, one with a sequence to spare, and count it as there."""
        blocks = list(_hashes(request))
        free = [number for number, load in enumerate(self._replicas) if load.requests < load.max_sequences]
        chosen = min(free, key=self._load)
        holders = self._holders(blocks)
        warm = [number for number in free if holders >> number & 1]
        if warm:
            warmest = min(warm, key=self._load)
            ahead = self._replicas[warmest].requests - self._replicas[chosen].requests
            chosen = warmest if ahead <= MOST_AHEAD else chosen
        self._remember(blocks, chosen)
        load = self._replicas[chosen]
        load.requests += 1
        load.tokens += len(request.prompt_ids)
        load.dispatched += 1
        return chosen

    def ended(self, number: int, request: Request) -> None:
        """Note that replica `number` has nothing more to do for `request`."""
        self._replicas[number].requests -= 1
        self._replicas[number].tokens -= len(request.prompt_ids)

    def _load(self, number: int) -> tuple[int, int, int]:
        load = self._replicas[number]
        return load.requests, load.tokens, load.dispatched

    def _holders(self, blocks: Sequence[int]) -> int:
        """Return the bits of the replicas that have run the longest beginning known; 0 for none."""
        bits = 0
        for block in blocks:
            if block not in self._seen:
                break
            bits = self._seen[block]
        return bits

    def _remember(self, blocks: Sequence[int], number: int) -> None:
        for block in blocks:
            self._seen[block] = self._seen.pop(block, 0) | 1 << number
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)


def _hashes(request: Request) -> Iterator[int]:
    """Yield a hash for each whole block, of the prompt up to its end; caches are an adapter's own."""
    ids, so_far = request.prompt_ids, hash(request.adapter)
    for end in range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS):
        so_far = hash((so_far, ids[end - BLOCK_TOKENS : end]))
        yield so_far
