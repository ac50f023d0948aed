"""Decode steps captured once and replayed: on a GPU one launch instead of some 25 a layer (CUDA graphs).

A graph repeats its operations on the same memory in the same sizes. So it belongs to a `GraphKey`: blocks of
neighbouring slots, and bounds on their lengths; ids, positions and adapters come from its `GraphInputs`.
Slots of a block that do not decode run a token whose logits are not read. Steps with prompts run without a
graph. Does not know models or requests. Start at `GraphCache.run`.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.errors import is_out_of_memory
from runtime.serving.engine.adapter_groups import AdapterGroups, Masked
from runtime.serving.engine.batch import Batch, HostBatch
from runtime.serving.engine.lora import AdapterStore

log = logging.getLogger(__name__)
SlotRun: Any = None  # replaced with the graphs of engine20

CAPTURE_AFTER = 4
"""Steps of one key after which a graph is captured: a capture costs as much as several steps."""
MAX_GRAPHS = 64
"""Graphs kept; the one that was replayed longest ago is dropped first."""
MIN_REACH = 256
"""Lengths are bounded in steps of so many positions, and of a quarter beyond four of them."""
TOLERANCE = 0.02
"""Fraction of the largest logit by which a replay may differ from the same step without a graph."""


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring slots, at least half of which decode."""

    first: int
    count: int
    reach: int
    """Positions that are read of each."""


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What a graph fixes."""

    blocks: tuple[Block, ...]
    slot_tokens: int
    """Tokens of each slot: one, or more where a lone sequence has drafts."""
    adapted: bool
    """Whether any token has an adapter."""
    long: bool
    """Whether any token has rotary factors for long contexts."""

    @property
    def tokens(self) -> int:
        """Tokens that run."""
        return self.slot_tokens * sum(block.count for block in self.blocks)

    @property
    def slots(self) -> list[int]:
        """The slots of the tokens, in order."""
        return [slot for block in self.blocks for slot in range(block.first, block.first + block.count)]


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """What a graph reads, in the order of its `T` tokens."""

    numbers: Tensor
    """(2, T) ids and positions."""
    mask: Tensor | None
    """(T, 1, A, 1), one where the token has the adapter."""
    long: Tensor | None
    """(T,)"""


class GraphBackend(Protocol):
    """How this device captures graphs."""

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Run `step` where it will be captured, and return its result."""

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        """Return what repeats the operations of `step` on the same memory."""

    def reset(self) -> None:
        """Free what was captured; none of it is replayed again."""


class CudaGraphs:
    """Captures on an NVIDIA GPU."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """See `GraphBackend.warm_up`: what libraries set up once per stream is set up here."""
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                return step()
        finally:  # also where memory ran out: the step that follows writes to the same cache
            torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        """See `GraphBackend.capture`; RuntimeError where `step` does what a graph cannot hold."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: other threads of this process may allocate meanwhile
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                step()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
        return graph.replay

    def reset(self) -> None:
        """See `GraphBackend.reset`: the memory pool goes with its last graph."""
        self._pool = torch.cuda.graph_pool_handle()


class GraphCache:
    """The captured steps of one model."""

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        adapters: AdapterStore,
        *,
        slots: int,
        positions: int,
        backend: GraphBackend,
    ) -> None:
        """`forward` runs a batch on a cache of `slots` and `positions`; no sequence fills the last."""
        self._forward, self._adapters = forward, adapters
        self._slots, self._positions = slots, positions
        self._backend: GraphBackend | None = backend
        self._kept: OrderedDict[GraphKey, tuple[GraphInputs, Callable[[], object]]] = OrderedDict()
        self._seen: Counter[GraphKey] = Counter()
        self._is_full = False
        """Whether memory ran out for a further graph: those that are kept are still replayed."""
        self._logits: dict[int, Tensor] = {}
        """(T, V) by T: where replays leave their result, to be read before the next."""

    def run(self, host: HostBatch) -> Tensor | None:
        """Return the logits of the tokens of `host`, or None where it has to run without a graph."""
        if self._backend is None or (key := self._key(host)) is None:
            return None
        self._seen[key] += 1
        # the index of each token of the step among those of the graph
        index = {slot: number for number, slot in enumerate(key.slots)}
        at = [index[slot] for slot in host.decode_slots] or list(range(len(host.ids)))
        try:
            return self._replay(key, host, at)
        except Exception as failure:
            if not is_out_of_memory(failure):
                raise
        self._kept.pop(key, None)
        self._is_full = True
        log.warning("No memory for a CUDA graph: %d are kept, other steps are launched", len(self._kept))
        return None

    def _replay(self, key: GraphKey, host: HostBatch, at: list[int]) -> Tensor | None:
        """Run the graph of `key`, captured first where it is due; None where there is none."""
        if key in self._kept:
            self._kept.move_to_end(key)
            inputs, replay = self._kept[key]
            self._fill(inputs, host, at)
            replay()
            return _pick(self._logits[key.tokens], at)
        if self._backend is None or self._is_full or self._seen[key] < CAPTURE_AFTER:
            return None
        inputs = self._inputs(key)
        self._fill(inputs, host, at)
        return self._capture(self._backend, key, inputs, at)

    def clear(self) -> None:
        """Drop all graphs: the adapters' weights have moved."""
        self._is_full = False
        self._kept.clear()
        self._seen.clear()
        if self._backend is not None:
            self._backend.reset()

    def _key(self, host: HostBatch) -> GraphKey | None:
        """Return the key of `host`, or None: prompts, and more adapters than one masked product takes."""
        adapted = any(version is not None for version in host.adapters)
        if not host.ids or (adapted and not self._adapters.is_masked):
            return None
        if not host.chunks:
            ends = {slot: last + 1 for slot, last in zip(host.decode_slots, host.positions, strict=True)}
            slot_tokens = 1
        elif len(host.chunks) == 1 and len(host.logit_indices) == len(host.ids):  # one sequence with drafts
            ends = {host.chunks[0].slot: host.positions[-1] + 1}
            slot_tokens = 1 + _power(len(host.ids) - 1)
        else:
            return None
        blocks = []
        for first, count in _blocks(sorted(ends), most=self._slots):
            longest = max(ends.get(slot, 0) for slot in range(first, first + count))
            blocks.append(Block(first, count, min(_reach(longest), self._positions)))
        return GraphKey(tuple(blocks), slot_tokens, adapted, any(host.long))

    def _inputs(self, key: GraphKey) -> GraphInputs:
        device = self._adapters.device
        return GraphInputs(
            torch.zeros(2, key.tokens, dtype=torch.long, device=device),
            self._adapters.mask([None] * key.tokens) if key.adapted else None,
            torch.zeros(key.tokens, dtype=torch.bool, device=device) if key.long else None,
        )

    def _fill(self, inputs: GraphInputs, host: HostBatch, at: Sequence[int]) -> None:
        tokens = inputs.numbers.shape[1]
        # the other tokens write to the last position, which no sequence fills: its last token is never run
        ids, positions = [0] * tokens, [self._positions - 1] * tokens
        versions: list[int | None] = [None] * tokens
        long = [False] * tokens
        for source, token in enumerate(at):
            ids[token], positions[token] = host.ids[source], host.positions[source]
            versions[token], long[token] = host.adapters[source], host.long[source]
        inputs.numbers.copy_(torch.tensor([ids, positions]), non_blocking=True)
        if inputs.mask is not None:
            inputs.mask.copy_(self._adapters.mask(versions), non_blocking=True)
        if inputs.long is not None:
            inputs.long.copy_(torch.tensor(long), non_blocking=True)

    def _capture(self, backend: GraphBackend, key: GraphKey, inputs: GraphInputs, at: list[int]) -> Tensor:
        """Run the step without a graph, and keep a graph of it if that computes the same."""
        plain = backend.warm_up(lambda: self._step(key, inputs))
        expected = _pick(plain, at)
        if not bool(expected.isfinite().all()):  # nothing to compare with
            return expected
        result = self._logits.setdefault(key.tokens, torch.empty_like(plain))
        try:
            replay = backend.capture(lambda: result.copy_(self._step(key, inputs)))
            replay()
            error = float((_pick(result, at) - expected).abs().max() / expected.abs().max())
            reason = f"a replay differs by {error:.2g} of the largest logit" if error > TOLERANCE else ""
        except Exception as failure:  # the step has its result already
            if is_out_of_memory(failure):
                raise
            reason = str(failure).partition("\n")[0]
        if reason:
            log.warning("Decoding without CUDA graphs, which is slower: %s", reason)
            self.clear()
            self._backend = None
            return expected
        self._kept[key] = (inputs, replay)
        if len(self._kept) > MAX_GRAPHS:
            self._kept.popitem(last=False)
        log.debug("Captured %s", key)
        return expected

    def _step(self, key: GraphKey, inputs: GraphInputs) -> Tensor:
        """Run the tokens of `inputs`; nothing in here may need a number on the host."""
        ids, positions = inputs.numbers
        slots: list[Tensor] = []
        runs: list[SlotRun] = []
        for block in key.blocks:
            slots.append(torch.arange(block.first, block.first + block.count, device=ids.device))
            offset, count = sum(run.count * run.slot_tokens for run in runs), block.count * key.slot_tokens
            lengths = positions[offset : offset + count] + 1
            run = SlotRun(
                offset,
                block.first,
                block.count,
                block.reach,
                lengths,
                ragged=True,
                slot_tokens=key.slot_tokens,
            )
            runs.append(run)
        groups = AdapterGroups((), Masked(key.tokens, inputs.mask)) if inputs.mask is not None else None
        batch = Batch(
            ids=ids[None],
            positions=positions[None],
            decode_tokens=key.tokens,
            slots=torch.cat(slots)[:, None].expand(-1, key.slot_tokens).flatten(),
            decode_positions=positions,
            runs=tuple(runs),
            chunks=(),
            logit_indices=torch.arange(key.tokens, device=ids.device),
            adapter_groups=groups,
            long=inputs.long,
        )
        return self._forward(batch)


def _pick(logits: Tensor, at: list[int]) -> Tensor:
    """Return the logits `at` of (T, V); a view where they are the first ones."""
    if at[-1] == len(at) - 1:
        return logits[: len(at)]
    return logits[torch.tensor(at).to(logits.device, non_blocking=True)]


def _blocks(slots: list[int], *, most: int) -> list[tuple[int, int]]:
    """Return (first, count) of aligned blocks of 1, 2, 4 … of `most` slots that hold the sorted `slots`.

    Each is the smallest that holds its slots, and at least half full: so changing sequences make few keys.
    """
    size = 1
    while slots[0] // size != slots[-1] // size:
        size *= 2
    first = slots[0] // size * size
    if size <= 2 * len(slots):
        return [(first, min(size, most - first))]
    middle = first + size // 2
    low, high = [slot for slot in slots if slot < middle], [slot for slot in slots if slot >= middle]
    return _blocks(low, most=most) + _blocks(high, most=most)


def _power(count: int) -> int:
    """Return the least power of two that is not below `count`; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def _reach(positions: int) -> int:
    """Return a bound on `positions` that a growing sequence passes seldom."""
    step = max(MIN_REACH, _power(positions) // 8)
    return -(-positions // step) * step
