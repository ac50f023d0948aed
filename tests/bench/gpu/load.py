"""An engine under a load, and what was seen: tokens a second, each step's time, the part that was replayed.

The engine is the one that `create` makes; its steps are timed and its graph replays counted from outside.
Every load is run once before it counts, on the same slots. Start at `serving`, then `Running.equal` and
`Running.poisson`.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.model_source import ModelSource, Quantization
from runtime.serving.engine import cuda_graphs, sampling
from runtime.serving.engine.create import create
from runtime.serving.engine.protocol import Request, Sampling
from runtime.serving.settings import Limits, ServeConfig
from runtime.transfers import HostCopy
from tests.bench.gpu.step import Context, Figures, NotHereError, percentile

VOCABULARY = 500
MOST_REQUESTS = 2000
BUSY_SHARE = 0.8
"""Of an engine's rows, that random arrivals keep busy."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of an engine."""

    prompt: tuple[int, int]
    """Least and most tokens of a prompt."""
    new: tuple[int, int]
    """Least and most tokens of an answer."""
    adapters: Sequence[str | None] = (None,)
    """In turn."""
    sampling: dict[str, Any] = field(default_factory=dict)

    def request(self, number: int) -> Request:
        """Return a request that no other is like: nothing of its prompt is in a cache."""
        unique = next(_unique)
        draw = random.Random(unique)
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(*self.prompt)))
        sampling = Sampling(max_new_tokens=draw.randint(*self.new), **self.sampling)
        adapter = self.adapters[number % len(self.adapters)]
        return Request(ids, sampling, adapter=adapter, id=str(unique))

    def requests(self, count: int) -> list[Request]:
        """Return so many."""
        return [self.request(number) for number in range(count)]


_unique = itertools.count()


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered request."""

    asked: float
    times: tuple[float, ...]
    """When each token came."""

    @property
    def first_token_ms(self) -> float:
        return 1000 * (self.times[0] - self.asked)


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One step that had work."""

    began: float
    ended: float
    running: int
    """Requests that had been admitted before it."""
    prompt_tokens: int
    """Prompt tokens of all requests that had their first token before it."""
    replayed: bool
    waited: float
    """How long the host waited for tokens in it: the rest is its own work, for which a GPU may wait."""


@dataclass(slots=True)
class Counts:
    """What happened in the engine's thread."""

    steps: list[EngineStep] = field(default_factory=list)
    replays: int = 0
    waited: float = 0.0


@dataclass(slots=True)
class Running:
    """An engine, and what is counted of it."""

    engine: Any
    counts: Counts
    position_bytes: int
    """Keys and values of one position of one sequence."""
    weight_bytes: int

    def equal(self, rows: int, load: Load) -> Figures:
        """Answer `rows` requests at a time, and return the speed while all of them decode.

        NotHereError where the engine has memory for fewer.
        """
        if self.engine.max_sequences < rows:
            raise NotHereError(f"memory for {self.engine.max_sequences} of {rows} rows")
        asyncio.run(self._all(load.requests(rows)))  # the same slots and lengths: kernels, graphs, memory
        self.counts.steps.clear()
        asyncio.run(self._all(load.requests(rows)))
        begun = self.engine.stats().prompt_tokens
        steps = [each for each in self.counts.steps if (each.running, each.prompt_tokens) == (rows, begun)]
        if not steps:
            raise RuntimeError(f"in none of {len(self.counts.steps)} steps did all of {rows} rows decode")
        taken = steps[-1].ended - steps[0].began
        return {"tokens_per_s": rows * len(steps) / taken} | _times(steps)

    @contextlib.contextmanager
    def overlap(self, *, on: bool) -> Iterator[None]:
        """Within: steps are launched before the tokens of the one before are read, or not."""
        engine, before = self.engine, self.engine._overlaps
        engine._queue.call(lambda: setattr(engine, "_overlaps", on))
        try:
            yield
        finally:
            engine._queue.call(lambda: setattr(engine, "_overlaps", before))

    def rate(self, rows: int, load: Load) -> float:
        """Return how many requests a second keep BUSY_SHARE of `rows` busy, by the second of two loads."""
        began = 0.0
        for _ in range(2):
            began = time.monotonic()
            asyncio.run(self._all(load.requests(2 * rows)))
        return BUSY_SHARE * 2 * rows / (time.monotonic() - began)

    def poisson(self, rate: float, load: Load, *, seconds: float) -> Figures:
        """Answer requests that arrive at random, so many a second, for some seconds."""
        asyncio.run(self._all(load.requests(self.engine.max_sequences)))  # its kernels, all rows busy
        self.counts.steps.clear()
        began = time.monotonic()
        answers = asyncio.run(self._arrive(rate, seconds, load.request))
        until = began + seconds
        tokens = sum(stamp <= until for answer in answers for stamp in answer.times)
        waits = [answer.first_token_ms for answer in answers]
        return {
            "tokens_per_s": tokens / seconds,
            **_times(self.counts.steps),
            "ttft_p50_ms": percentile(waits, 0.5),
            "ttft_p99_ms": percentile(waits, 0.99),
            "requests_per_s": rate,
        }

    def first_token(self, lengths: Sequence[int]) -> Figures:
        """Return the time to the first token of prompts of lengths that are new here, and met again."""
        figures: Figures = {"lengths": len(lengths)}
        for name in ("new", "again"):
            loads = [Load((length, length), (1, 1)) for length in lengths]
            times = [asyncio.run(self._all(load.requests(1)))[0].first_token_ms for load in loads]
            figures |= {f"{name}_p{share}_ms": percentile(times, share / 100) for share in (50, 99)}
        return figures

    def roofline(self, context: Context, rows: int, positions: float) -> float:
        """Return tokens a second if a step only reads the weights and each row's keys and values once."""
        step_bytes = self.weight_bytes + rows * positions * self.position_bytes
        return rows * context.copy_gb_per_s() * 1e9 / step_bytes

    async def _ask(self, request: Request) -> Answer:
        asked = time.monotonic()
        times = [time.monotonic() async for token in self.engine.submit(request) if token.id is not None]
        return Answer(asked, tuple(times))

    async def _all(self, requests: Sequence[Request]) -> list[Answer]:
        return await asyncio.gather(*map(self._ask, requests))

    async def _arrive(self, rate: float, seconds: float, make: Callable[[int], Request]) -> list[Answer]:
        """Ask as a Poisson process does, for some seconds, and wait for the last answer."""
        draw = random.Random(7)
        asked: list[asyncio.Task[Answer]] = []
        due = time.monotonic()
        until = due + seconds
        while (due := due + draw.expovariate(rate)) < until and len(asked) < MOST_REQUESTS:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            asked.append(asyncio.create_task(self._ask(make(len(asked)))))
        return await asyncio.gather(*asked)


def _times(steps: Sequence[EngineStep]) -> Figures:
    """Return the times of `steps`, and the share of them that was replayed."""
    times = [1000 * (step.ended - step.began) for step in steps]
    return {
        "step_p50_ms": percentile(times, 0.5),
        "step_p99_ms": percentile(times, 0.99),
        "replay_share": sum(step.replayed for step in steps) / max(len(steps), 1),
        "waited_share": 1000 * sum(step.waited for step in steps) / max(sum(times), 1e-9),
        "steps": len(steps),
    }


@contextlib.contextmanager
def serving(
    context: Context, model: Any, *, rows: int, context_tokens: int, quantization: Quantization | None = None
) -> Iterator[Running]:
    """Within: an engine over `model` with so many rows, each step timed and each replay counted."""
    counts = Counts()
    weight_bytes = sum(each.numel() * each.element_size() for each in model.parameters())
    size = model.config
    dim = getattr(size, "head_dim", None) or size.hidden_size // size.num_attention_heads
    position_bytes = 2 * size.num_hidden_layers * size.num_key_value_heads * dim * model.dtype.itemsize
    config = ServeConfig(
        model=ModelSource(name="bench"),
        served_name="m",
        quantization=quantization,
        speculative_tokens=0,
        limits=Limits(rows=rows, context_tokens=context_tokens, queue=MOST_REQUESTS),
    )
    with _counted_replays(counts), _timed_reads(counts):
        engine = create(config, model)
        _time_steps(engine, counts)
        try:
            yield Running(engine, counts, position_bytes, weight_bytes)
        finally:
            engine.close()


@contextlib.contextmanager
def _timed_reads(counts: Counts) -> Iterator[None]:
    """Within: what the host waits for tokens is timed."""

    class TimedCopy(HostCopy):
        def read(self) -> Any:
            began = time.monotonic()
            try:
                return super().read()
            finally:
                counts.waited += time.monotonic() - began

    sampling.HostCopy = TimedCopy  # type: ignore[misc]
    try:
        yield
    finally:
        sampling.HostCopy = HostCopy  # type: ignore[misc]


@contextlib.contextmanager
def _counted_replays(counts: Counts) -> Iterator[None]:
    """Within: engines are made with graphs whose replays are counted."""
    plain = cuda_graphs.CudaGraphs

    class CountedGraphs(plain):  # type: ignore[misc, valid-type]
        def capture(self, step: Any) -> Any:
            replay = super().capture(step)

            def counted() -> object:
                counts.replays += 1
                return replay()

            return counted

    cuda_graphs.CudaGraphs = CountedGraphs  # type: ignore[misc]
    try:
        yield
    finally:
        cuda_graphs.CudaGraphs = plain  # type: ignore[misc]


def _time_steps(engine: Any, counts: Counts) -> None:
    """Time the steps of `engine` that begin with something to run; waiting for a request is no step."""
    step = engine.step

    def timed() -> None:
        stats, replays, waited = engine.stats(), counts.replays, counts.waited
        began = time.monotonic()
        step()
        if stats.running:
            ended, replayed = time.monotonic(), counts.replays > replays
            counts.steps.append(
                EngineStep(began, ended, stats.running, stats.prompt_tokens, replayed, counts.waited - waited)
            )

    engine.step = timed
