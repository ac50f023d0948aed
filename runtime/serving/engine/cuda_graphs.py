"""Decode steps captured once and replayed: on a GPU one launch instead of some 25 a layer (CUDA graphs).

A graph repeats its operations on the same memory in the same sizes. So there is one for each padded number of
tokens, captured at the start in one pool of memory, and a second set for steps with adapters, whose weights
each token gathers by its slot. What differs from step to step is in a graph's `GraphInputs`, filled by one
copy; rows that pad write and read a position that nobody owns. Steps with prompts run without a graph. Does
not know models or requests. Start at `GraphCache.run`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from runtime.errors import is_out_of_memory
from runtime.serving.engine.adapter_groups import NO_ADAPTER, AdapterGroups
from runtime.serving.engine.batch import Batch, HostBatch, HostRanges, KeyRanges, with_chosen
from runtime.serving.engine.kv_pool import KvPool
from runtime.serving.engine.lora import AdapterStore
from runtime.transfers import fill

log = logging.getLogger(__name__)

MOST_TOKENS = 512
"""A step of more is not captured: its products take longer than their launches."""
MEMORY_SHARE = 0.25
"""Of the memory that is free when a set is captured, which prompts need too."""
CAPTURE_S = 60.0
"""No graph of a set is begun later."""
DRAFT_READS = 1 << 15
"""Positions read for drafts in a replay, where each draft token reads its sequence's again: beyond it, as in
17 tokens of a sequence of 2,000, reading costs more than the launches of one pass over all of them."""
TOLERANCE = 0.02
"""Fraction of the largest logit by which a replay may differ from the same step without a graph."""


class GraphBackend(Protocol):
    """How this device captures graphs."""

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Run `step` where it will be captured, and return its result."""

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        """Return what repeats the operations of `step` on the same memory."""

    def free_bytes(self) -> int:
        """Return the memory of the device that nothing holds."""


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

    def free_bytes(self) -> int:
        """See `GraphBackend.free_bytes`; what torch keeps for later is given back first."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])


@dataclass(frozen=True, slots=True)
class StepBounds:
    """What holds for every decode step of an engine."""

    tokens: int
    """Most tokens of a step: sequences that decode, or a lone one's drafts."""
    positions: int
    """Most positions that a token sees."""
    is_long: bool
    """Whether some sequences have rotary factors for long contexts."""


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """What a graph of `T` tokens reads, in its place."""

    buffer: Tensor
    """int64, what `filled` returns."""
    batch: Batch
    """Its tensors are views of the buffer."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured step."""

    inputs: GraphInputs
    replay: Callable[[], object]
    logits: Tensor
    """(T, V): where a replay leaves its result, to be read before the next of any graph."""


_STEPS = ((8, 0), (64, 8), (128, 16), (256, 64), (MOST_TOKENS, 128))
"""Below a size, the step to the next; 0 doubles."""


def sizes(most: int) -> list[int]:
    """Return the numbers of tokens that graphs are captured for, up to `most`: at most 19.

    A step pads by 7 tokens, or by a third, at most: with few tokens its time is that of reading weights.
    """
    found, size, most = [], 1, min(most, MOST_TOKENS)
    while size < most:
        found.append(size)
        size += next(step for below, step in _STEPS if size < below) or size
    return [*found, most]


class GraphCache:
    """The captured steps of one model."""

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        adapters: AdapterStore,
        pool: KvPool,
        bounds: StepBounds,
        *,
        backend: GraphBackend,
    ) -> None:
        """`forward` runs a batch over `pool`."""
        self._forward, self._adapters = forward, adapters
        self._pool, self._bounds = pool, bounds
        self._backend: GraphBackend | None = backend
        self._plain: dict[int, Graph] = {}
        self._adapted: dict[int, Graph] = {}
        self._layout = adapters.layout
        """Of the weights that `_adapted` reads."""
        self._logits: Tensor | None = None
        """(tokens, V): what graphs of up to so many tokens share for their results."""

    def capture(self) -> None:
        """Capture what decodes without adapters; with them `follow_adapters` does."""
        self._plain = self._capture_set(adapted=False)

    def follow_adapters(self) -> None:
        """Capture the steps with adapters again where weights have moved, as an adapter came or went."""
        if self._layout == self._adapters.layout:
            return
        self._layout = self._adapters.layout
        self._adapted = {}  # their memory is free before it is taken again
        if self._adapters.names:
            self._adapted = self._capture_set(adapted=True)

    def run(self, host: HostBatch, chosen: Tensor | None = None) -> Tensor | None:
        """Return the logits of the tokens of `host`, or None where it has to run without a graph.

        `chosen` as in `assemble`. The next run writes its logits where these are.
        """
        graphs = self._adapted if any(version is not None for version in host.adapters) else self._plain
        tokens = len(host.ids)
        size = min((size for size in graphs if size >= tokens), default=0)
        if not size or not tokens or not _is_decoding(host):
            return None
        graph = graphs[size]
        fill(graph.inputs.buffer, self._filled(host, size))
        if chosen is not None:
            ids = graph.inputs.batch.ids
            ids.copy_(with_chosen(ids, chosen))
        try:
            graph.replay()
        except Exception as failure:
            if not is_out_of_memory(failure):
                raise
            del graphs[size]
            log.warning("No memory to replay the CUDA graph of %d sequences: others take its steps", size)
            return None
        return graph.logits[:tokens]

    def _capture_set(self, *, adapted: bool) -> dict[int, Graph]:
        """Return the graphs of all sizes, the largest first; fewer where memory or time runs out."""
        backend = self._backend
        if backend is None:
            return {}
        begun, free = time.monotonic(), backend.free_bytes()
        found: dict[int, Graph] = {}
        lacking = ""
        for size in reversed(sizes(self._bounds.tokens)):
            if time.monotonic() - begun > CAPTURE_S:
                lacking = f"no more were begun after {CAPTURE_S:.0f} s"
                break
            if free - backend.free_bytes() > MEMORY_SHARE * free:
                lacking = f"more would take over {MEMORY_SHARE:.0%} of the free memory"
                break
            try:
                found[size] = self._capture(backend, size, adapted=adapted)
            except Exception as failure:
                if not is_out_of_memory(failure):
                    self._give_up(str(failure).partition("\n")[0])
                    return {}
                lacking = f"there was no memory for {size} sequences"
        self._log(found, lacking, begun=begun, taken=free - backend.free_bytes(), adapted=adapted)
        return found

    def _log(self, found: dict[int, Graph], lacking: str, *, begun: float, taken: int, adapted: bool) -> None:
        log.log(
            logging.WARNING if lacking else logging.INFO,
            "Captured %d CUDA graphs of steps %s adapters, of up to %d sequences, in %.1f s and %d MiB%s",
            len(found),
            "with" if adapted else "without",
            max(found, default=0),
            time.monotonic() - begun,
            max(0, taken) >> 20,
            f": {lacking}; other steps are launched, which is slower" if lacking else "",
        )

    def _give_up(self, reason: str) -> None:
        log.warning("Decoding without CUDA graphs, which is slower: %s", reason)
        self._backend, self._plain, self._adapted = None, {}, {}

    @torch.inference_mode()
    def _capture(self, backend: GraphBackend, size: int, *, adapted: bool) -> Graph:
        """Return the graph of a step; RuntimeError where it computes something else than the step."""
        inputs = self._inputs(size, adapted=adapted)
        fill(inputs.buffer, self._filled(_NOTHING, size))
        expected = backend.warm_up(lambda: self._step(inputs))
        if not bool(expected.isfinite().all()):  # and others read past their end into the same position
            for kind, position in enumerate(self._pool.scratch):
                self._pool.clear(kind, position, 1)
            raise RuntimeError("the model's output for token 0 contains NaN or Inf")
        if self._logits is None or len(self._logits) < size:
            self._logits = torch.empty_like(expected)
        result = self._logits[:size]
        replay = backend.capture(lambda: result.copy_(self._step(inputs)))
        replay()
        error = float((result - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise RuntimeError(f"a replay differs by {error:.2g} of the largest logit")
        return Graph(inputs, replay, result)

    def _step(self, inputs: GraphInputs) -> Tensor:
        """Run the tokens of `inputs`; nothing in here may need a number on the host."""
        long = inputs.batch.long
        return self._forward(replace(inputs.batch, long=long.bool() if long is not None else None, shared={}))

    def _inputs(self, size: int, *, adapted: bool) -> GraphInputs:
        """Return inputs of zeros for `size` tokens."""
        windows = self._pool.kinds.windows
        kinds, device = len(windows), self._adapters.device
        wide, narrow_count = (4 + kinds) * size, kinds * (2 * size + 1)
        buffer = torch.zeros(wide + (narrow_count + 1) // 2, dtype=torch.int64, device=device)
        ids, positions, slots, long, *stores = torch.split(buffer[:wide], size)
        narrow = torch.split(buffer[wide:].view(torch.int32)[:narrow_count], 2 * size + 1)
        ranges = [
            KeyRanges(
                starts=bounds[: size + 1],
                lengths=bounds[size + 1 :],
                stores=own,
                longest_decode=min(window or self._bounds.positions, self._bounds.positions),
            )
            for window, bounds, own in zip(windows, narrow, stores, strict=True)
        ]
        batch = Batch(
            ids=ids[None],
            positions=positions[None],
            decode_tokens=size,
            ranges=tuple(ranges),
            query_offsets=torch.zeros(1, dtype=torch.int32, device=device),
            longest_query=0,
            chunks=(),
            logit_indices=torch.arange(size, device=device),
            adapter_groups=AdapterGroups((), slots) if adapted else None,
            long=long if self._bounds.is_long else None,
        )
        return GraphInputs(buffer, batch)

    def _filled(self, host: HostBatch, size: int) -> Tensor:
        """Return what the buffer of `size` tokens holds for `host`: its tokens, then those that pad."""
        padding = [0] * (size - len(host.ids))
        wide = [*host.ids, *padding, *host.positions, *padding]
        wide += [*self._adapters.slots(host.adapters), *([NO_ADAPTER] * len(padding)), *host.long, *padding]
        narrow: list[int] = []
        for ranges, window, scratch in zip(
            host.ranges or [_NO_RANGES] * len(self._pool.scratch),
            self._pool.kinds.windows,
            self._pool.scratch,
            strict=True,
        ):
            starts, lengths = _by_token(ranges, host.counts, window)
            starts += [scratch] * len(padding)
            lengths += [1] * len(padding)
            wide += [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
            narrow += [*starts, 0, *lengths]
        narrow += [0] * (len(narrow) % 2)
        return torch.cat((torch.tensor(wide), torch.tensor(narrow, dtype=torch.int32).view(torch.int64)))


_NO_RANGES = HostRanges([], [])
_NOTHING = HostBatch([], [], 0, [], (), [], [], [])
"""A step of which every token pads."""


def _is_decoding(host: HostBatch) -> bool:
    """Whether each token of `host` is sampled after and can be one of a sequence that decodes.

    So are drafts: each reads what its sequence has before it, the keys of earlier ones included.
    """
    if len(host.logit_indices) != len(host.ids):
        return False
    drafts = slice(host.decode_tokens, None)
    return all(
        sum(
            (count - 1) * length
            for count, length in zip(host.counts[drafts], ranges.lengths[drafts], strict=True)
        )
        <= DRAFT_READS
        for ranges in host.ranges
    )


def _by_token(ranges: HostRanges, counts: Sequence[int], window: int | None) -> tuple[list[int], list[int]]:
    """Return starts and lengths as if each token of a sequence were one of a sequence of its own."""
    starts: list[int] = []
    lengths: list[int] = []
    for start, length, count in zip(ranges.starts, ranges.lengths, counts, strict=True):
        for seen in range(length - count + 1, length + 1):
            hidden = max(0, seen - window) if window is not None else 0
            starts.append(start + hidden)
            lengths.append(seen - hidden)
    return starts, lengths
