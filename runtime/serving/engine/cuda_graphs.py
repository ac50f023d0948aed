"""Decode steps recorded once and replayed: on a GPU one launch in place of some 25 a layer (CUDA graphs).

A recording repeats its operations on the same memory in the same sizes. So it stands for a `GraphKey`: blocks
of neighbouring slots, and bounds on their lengths; ids, positions and adapters come from its `GraphInputs`.
Slots of a block that do not decode run a token that nobody reads. Prompts run as they come. Does not know
models or requests. Start at `GraphCache.run`.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from runtime.serving.engine.adapter_groups import AdapterGroups, Masked
from runtime.serving.engine.batch import Batch, HostBatch, SlotRun
from runtime.serving.engine.lora import AdapterStore

log = logging.getLogger(__name__)

WORTH = 4
"""A form is recorded when a step has it for this many times: recording costs as much as several steps."""
MOST = 64
"""Recordings kept; the one that was replayed longest ago gives way."""
LEAST_REACH = 256
"""Lengths are bounded in steps of so many positions, and of a quarter beyond four of them."""
TOLERANCE = 0.02
"""Part of the largest logit by which a replay may differ from the same step run as it comes."""


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring slots, at least half of which decode."""

    first: int
    count: int
    reach: int
    """Positions that are read of each."""


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What a recording fixes."""

    blocks: tuple[Block, ...]
    queries: int
    """Tokens of each slot: one, or more where one row's are guessed ahead."""
    adapted: bool
    """Whether any token has an adapter."""
    long: bool
    """Whether any token has rotary factors for long contexts."""

    @property
    def tokens(self) -> int:
        """Tokens that run."""
        return self.queries * sum(block.count for block in self.blocks)

    @property
    def slots(self) -> list[int]:
        """Whose tokens they are, in order."""
        return [slot for block in self.blocks for slot in range(block.first, block.first + block.count)]


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """What a recording reads, in the order of its `T` tokens."""

    numbers: Tensor
    """(2, T) ids and positions."""
    mask: Tensor | None
    """(T, 1, A, 1), one where the token has the adapter."""
    long: Tensor | None
    """(T,)"""


class GraphBackend(Protocol):
    """How this device records."""

    def rehearse(self, step: Callable[[], Tensor]) -> Tensor:
        """Run `step` where it will be recorded, and return its result."""

    def record(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        """Return what repeats the operations of `step` on the same memory."""

    def forget(self) -> None:
        """Nothing that was recorded is replayed again."""


class CudaGraphs:
    """Records on an NVIDIA GPU."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, step: Callable[[], Tensor]) -> Tensor:
        """See `GraphBackend.rehearse`: what libraries set up once per stream is set up here."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            out = step()
        torch.cuda.current_stream().wait_stream(self._stream)
        return out

    def record(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        """See `GraphBackend.record`; RuntimeError where `step` does what a graph cannot hold."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: other threads of this process may allocate meanwhile
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                step()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
        return graph.replay

    def forget(self) -> None:
        """See `GraphBackend.forget`: the memory pool goes with its last graph."""
        self._pool = torch.cuda.graph_pool_handle()


class GraphCache:
    """The recorded steps of one model."""

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        bank: AdapterStore,
        *,
        slots: int,
        positions: int,
        backend: GraphBackend,
    ) -> None:
        """`forward` runs a batch on a cache of `slots` and `positions`, the last of which no row fills."""
        self._forward, self._bank = forward, bank
        self._slots, self._positions = slots, positions
        self._backend: GraphBackend | None = backend
        self._kept: OrderedDict[GraphKey, tuple[GraphInputs, Callable[[], object]]] = OrderedDict()
        self._seen: Counter[GraphKey] = Counter()
        self._logits: dict[int, Tensor] = {}
        """(T, V) by T: where replays leave their result, to be read before the next."""

    def run(self, work: HostBatch) -> Tensor | None:
        """Return the logits of the tokens of `work`, or None where it is to run as it comes."""
        if self._backend is None or (form := self._form(work)) is None:
            return None
        self._seen[form] += 1
        # where each token of the work is among those of the recording
        place = {slot: number for number, slot in enumerate(form.slots)}
        at = [place[slot] for slot in work.decode_slots] or list(range(len(work.ids)))
        if form in self._kept:
            self._kept.move_to_end(form)
            inputs, replay = self._kept[form]
            self._fill(inputs, work, at)
            replay()
            return _pick(self._logits[form.tokens], at)
        if self._seen[form] < WORTH:
            return None
        inputs = self._inputs(form)
        self._fill(inputs, work, at)
        return self._record(self._backend, form, inputs, at)

    def forget(self) -> None:
        """Drop all recordings: the adapters lie elsewhere now."""
        self._kept.clear()
        self._seen.clear()
        if self._backend is not None:
            self._backend.forget()

    def _form(self, work: HostBatch) -> GraphKey | None:
        """Return the form that `work` has, or None: prompts, and more adapters than one product takes."""
        adapted = any(version is not None for version in work.adapters)
        if not work.ids or (adapted and not self._bank.is_masked):
            return None
        if not work.chunks:
            ends = {slot: place + 1 for slot, place in zip(work.decode_slots, work.positions, strict=True)}
            queries = 1
        elif len(work.chunks) == 1 and len(work.logit_indices) == len(work.ids):  # guesses of a lone row
            ends = {work.chunks[0].slot: work.positions[-1] + 1}
            queries = 1 + _power(len(work.ids) - 1)
        else:
            return None
        blocks = []
        for first, count in _blocks(sorted(ends), most=self._slots):
            longest = max(ends.get(slot, 0) for slot in range(first, first + count))
            blocks.append(Block(first, count, min(_reach(longest), self._positions)))
        return GraphKey(tuple(blocks), queries, adapted, any(work.long))

    def _inputs(self, form: GraphKey) -> GraphInputs:
        device = self._bank.device
        return GraphInputs(
            torch.zeros(2, form.tokens, dtype=torch.long, device=device),
            self._bank.mask([None] * form.tokens) if form.adapted else None,
            torch.zeros(form.tokens, dtype=torch.bool, device=device) if form.long else None,
        )

    def _fill(self, inputs: GraphInputs, work: HostBatch, at: Sequence[int]) -> None:
        tokens = inputs.numbers.shape[1]
        # the other tokens write to the last position, which no row fills: its last token is never run
        ids, places = [0] * tokens, [self._positions - 1] * tokens
        owners: list[int | None] = [None] * tokens
        long = [False] * tokens
        for place, token in enumerate(at):
            ids[token], places[token] = work.ids[place], work.positions[place]
            owners[token], long[token] = work.adapters[place], work.long[place]
        inputs.numbers.copy_(torch.tensor([ids, places]), non_blocking=True)
        if inputs.mask is not None:
            inputs.mask.copy_(self._bank.mask(owners), non_blocking=True)
        if inputs.long is not None:
            inputs.long.copy_(torch.tensor(long), non_blocking=True)

    def _record(self, backend: GraphBackend, form: GraphKey, inputs: GraphInputs, at: list[int]) -> Tensor:
        """Run the step as it comes, and keep a recording of it if that computes the same."""
        plain = backend.rehearse(lambda: self._step(form, inputs))
        right = _pick(plain, at)
        if not bool(right.isfinite().all()):  # nothing to compare with
            return right
        result = self._logits.setdefault(form.tokens, torch.empty_like(plain))
        try:
            replay = backend.record(lambda: result.copy_(self._step(form, inputs)))
            replay()
            error = float((_pick(result, at) - right).abs().max() / right.abs().max())
            reason = f"a replay differs by {error:.2g} of the largest logit" if error > TOLERANCE else ""
        except Exception as failure:  # the step has its result already, and goes on without
            reason = str(failure).partition("\n")[0]
        if reason:
            log.warning("Decoding without CUDA graphs, which is slower: %s", reason)
            self.forget()
            self._backend = None
            return right
        self._kept[form] = (inputs, replay)
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)
        log.debug("Recorded %s", form)
        return right

    def _step(self, form: GraphKey, inputs: GraphInputs) -> Tensor:
        """Run the tokens of `inputs`; nothing in here may need a number on the host."""
        ids, places = inputs.numbers
        slots: list[Tensor] = []
        runs: list[SlotRun] = []
        for block in form.blocks:
            slots.append(torch.arange(block.first, block.first + block.count, device=ids.device))
            offset, count = sum(run.count * run.slot_tokens for run in runs), block.count * form.queries
            lengths = places[offset : offset + count] + 1
            run = SlotRun(
                offset, block.first, block.count, block.reach, lengths, ragged=True, slot_tokens=form.queries
            )
            runs.append(run)
        groups = AdapterGroups((), Masked(form.tokens, inputs.mask)) if inputs.mask is not None else None
        batch = Batch(
            ids=ids[None],
            positions=places[None],
            decode_tokens=form.tokens,
            slots=torch.cat(slots)[:, None].expand(-1, form.queries).flatten(),
            decode_positions=places,
            runs=tuple(runs),
            chunks=(),
            logit_indices=torch.arange(form.tokens, device=ids.device),
            adapter_groups=groups,
            long=inputs.long,
        )
        return self._forward(batch)


def _pick(logits: Tensor, at: list[int]) -> Tensor:
    """Return the rows `at` of logits (T, V); a view where they are the first ones."""
    if at[-1] == len(at) - 1:
        return logits[: len(at)]
    return logits[torch.tensor(at).to(logits.device, non_blocking=True)]


def _blocks(slots: list[int], *, most: int) -> list[tuple[int, int]]:
    """Return (first, count) of aligned blocks of 1, 2, 4 … of `most` slots that hold the sorted `slots`.

    Each is the smallest that holds its own, and at least half full: so rows that come and go have few forms.
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
    """Return a bound on `positions` that a growing row passes seldom."""
    step = max(LEAST_REACH, _power(positions) // 8)
    return -(-positions // step) * step
