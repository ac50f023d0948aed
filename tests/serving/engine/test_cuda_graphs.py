"""CUDA graphs: the answers are those of steps without graphs, whatever a graph fixes.

On a CPU the backend traces the operations of a step and repeats exactly these on the same memory, as a CUDA
graph does: a number that a step takes from the host, or memory that moves later, shows in the answers.
"""

import asyncio
import copy
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from runtime.memory.pool import PoolSize
from runtime.serving.engine import cuda_graphs
from runtime.serving.engine.batch import HostBatch, HostRanges
from runtime.serving.engine.cuda_graphs import CudaGraphs, GraphCache, StepBounds
from runtime.serving.engine.engine import BatchingEngine, EngineLimits
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.kv_pool import LayerKinds
from runtime.serving.engine.model_runner import ModelRunner
from tests.families import SERVED, model_of
from tests.host_reads import HostReads
from tests.serving.engine.calls import Oracle, collect, generate, load, make_request, run
from tests.serving.engine.models import longrope_model, some_prompts

FORBIDDEN = {"_local_scalar_dense", "nonzero", "lift_fresh", "lift_fresh_copy", "masked_select"}
"""Operations that wait for the device or bring numbers from the host: a CUDA graph holds none."""


LIMITS = EngineLimits(max_sequences=4, context_tokens=200, max_waiting=8)


class Traces:
    """Captures the operations of a step, and repeats them."""

    def __init__(self) -> None:
        self.replays = self.captured = 0
        self.free = 1 << 30
        self.operations: set[str] = set()

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        return step()

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        graph = make_fx(step)()
        self.captured += 1
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        self.operations |= {str(node.target).split(".")[1] for node in calls if "." in str(node.target)}

        def replay() -> None:
            self.replays += 1
            graph()

        return replay

    def free_bytes(self) -> int:
        return self.free


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    monkeypatch.setattr(Kernels, "find", lambda: None)  # a trace does not see what they do
    return Traces()


@pytest.mark.parametrize("family", SERVED)
def test_captured_steps_answer_as_generate_does_alone_and_among_others(
    family: str, traces: Traces, oracle: Oracle
) -> None:
    model = model_of(family)
    prompts = some_prompts(3, 40, 1, 70, 17)
    expected = [generate(model, prompt, max_new_tokens=24) for prompt in prompts]
    oracle.known = [(*prompt, *answer) for prompt, answer in zip(prompts[:2], expected[:2], strict=True)]
    engine = BatchingEngine(
        model,
        EngineLimits(max_sequences=4, context_tokens=200, max_waiting=8, draft_tokens=3),
        graph_backend=traces,
    )
    requests = [make_request(prompt, max_new_tokens=24, id=str(n)) for n, prompt in enumerate(prompts)]
    together = [ids for ids, _ in run(engine, *requests)]
    among = traces.replays
    alone = [run(engine, request)[0][0] for request in requests]
    again = [ids for ids, _ in run(engine, *requests)]
    right = engine.stats().accepted_tokens
    engine.close()
    assert together == expected
    assert alone == expected
    assert again == expected
    assert among > 10
    assert traces.replays - among > 30
    assert right > 20
    assert not traces.operations & FORBIDDEN


def test_captured_steps_of_a_longrope_model_use_the_factors_of_each_sequence(traces: Traces) -> None:
    model = longrope_model()
    prompts = some_prompts(5, 65, 48, 100, 20)
    expected = [generate(model, prompt) for prompt in prompts]
    engine = BatchingEngine(
        copy.deepcopy(model),
        EngineLimits(max_sequences=4, context_tokens=200, max_waiting=8),
        graph_backend=traces,
    )
    requests = [make_request(prompt, id=str(n)) for n, prompt in enumerate(prompts)]
    together = [ids for ids, _ in run(engine, *requests)]
    alone = [run(engine, request)[0][0] for request in requests]
    engine.close()
    assert together == alone == expected
    assert traces.replays > 20


@pytest.fixture
def engine(tiny_llama_dir: Path, traces: Traces) -> Iterator[BatchingEngine]:
    made = BatchingEngine(
        load(tiny_llama_dir),
        EngineLimits(max_sequences=4, context_tokens=200, max_waiting=8),
        graph_backend=traces,
    )
    yield made
    made.close()


@pytest.fixture
def plain(tiny_llama_dir: Path) -> Iterator[BatchingEngine]:
    made = BatchingEngine(
        load(tiny_llama_dir), EngineLimits(max_sequences=4, context_tokens=200, max_waiting=8)
    )
    yield made
    made.close()


def test_adapters_come_and_go_between_graphs(
    engine: BatchingEngine, plain: BatchingEngine, traces: Traces, adapter_dirs: dict[str, Path]
) -> None:
    first, second = adapter_dirs.values()
    captured = []
    for change in (
        lambda each: each.add_adapter("a", first),
        lambda each: each.add_adapter("b", second),
        lambda each: each.remove_adapter("a"),
        lambda each: each.add_adapter("c", second, strength=0.5),
        lambda each: each.remove_adapter("c"),
        lambda each: each.add_adapter("c", first),
    ):
        begun = traces.captured
        change(engine)
        change(plain)
        captured.append(traces.captured - begun)
        names = [None, *engine.stats().adapters, None]
        requests = [make_request(adapter=name, id=str(number)) for number, name in enumerate(names)]
        before = traces.replays
        assert run(engine, *requests) == run(plain, *requests)
        assert run(engine, requests[1]) == run(plain, requests[1])
        assert traces.replays > before + 20
    # "b" brings layers and a rank that "a" has not, "a" takes its own with it; "c" finds room, then layers
    assert captured == [3, 3, 3, 0, 0, 3]


def test_adapters_of_one_shape_are_changed_in_place_and_many_need_no_more_graphs(
    engine: BatchingEngine, plain: BatchingEngine, traces: Traces, adapter_dirs: dict[str, Path]
) -> None:
    names = [f"a{number}" for number in range(26)]
    for each in (engine, plain):
        for number, name in enumerate(names):
            each.add_adapter(name, adapter_dirs["second"], strength=number / 25)
    assert traces.captured == 3 + 3 * 5, "again with slots for 3, 7, 11, 15 and 31 adapters"
    requests = [make_request(adapter=name, id=name) for name in names[-4:]]
    replays = traces.replays
    assert run(engine, *requests) == run(plain, *requests)
    assert traces.replays > replays + 10
    assert len(engine._runner._graphs._plain) + len(engine._runner._graphs._adapted) == 6  # type: ignore[union-attr]


def test_sampled_answers_and_log_probabilities_are_those_of_steps_without_graphs(
    engine: BatchingEngine, plain: BatchingEngine, traces: Traces
) -> None:
    options: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.3}, {"top_logprobs": 2}, {},
        {"temperature": 0.7, "top_p": 0.9, "seed": 6},
    ]  # fmt: skip
    requests = [make_request(id=str(n), max_new_tokens=40, **each) for n, each in enumerate(options)]
    assert run(engine, *requests) == run(plain, *requests)
    assert traces.replays > 20


def test_a_graph_keeps_the_cached_prefixes_of_idle_slots(
    engine: BatchingEngine, tiny_llama_dir: Path, traces: Traces
) -> None:
    prompts = some_prompts(60, 60, 60, 60, vocabulary=512)
    run(engine, *(make_request(prompt, id=str(n)) for n, prompt in enumerate(prompts)))
    run(engine, make_request(max_new_tokens=100, id="a"), make_request((7, 8, 9), max_new_tokens=100, id="b"))
    assert traces.replays > 60
    cached = engine.stats().cached_tokens
    model = load(tiny_llama_dir)
    for prompt in prompts:
        assert run(engine, make_request((*prompt, 9, 8)))[0][0] == generate(model, (*prompt, 9, 8))
    assert engine.stats().cached_tokens == cached + 4 * 60


class Broken(Traces):
    """Captures what does something else, or nothing at all."""

    def __init__(self, failure: str) -> None:
        super().__init__()
        self.failure = failure

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        if self.failure:
            raise RuntimeError(f"{self.failure}\nand more lines")
        out = step()
        return lambda: out.mul_(-1)


class Fast(Traces):
    """Runs the step again, which no trace slows down."""

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], object]:
        self.captured += 1
        return step


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("CUDA error: not permitted", "CUDA error: not permitted"),
        ("", "a replay differs by 2 of the largest"),
    ],
)
def test_a_graph_that_fails_or_differs_is_logged_once_and_never_replayed(
    tiny_llama_dir: Path, traces: Traces, caplog: pytest.LogCaptureFixture, failure: str, reason: str
) -> None:
    engine = BatchingEngine(
        load(tiny_llama_dir),
        EngineLimits(max_sequences=4, context_tokens=200, max_waiting=8),
        graph_backend=Broken(failure),
    )
    with caplog.at_level(logging.WARNING, logger="runtime.serving"):
        answers = [run(engine, make_request(id=str(number)))[0][0] for number in range(3)]
    engine.close()
    assert answers == [generate(load(tiny_llama_dir))] * 3
    (line,) = (each.getMessage() for each in caplog.records if each.name.endswith(".cuda_graphs"))
    assert line.startswith(f"Decoding without CUDA graphs, which is slower: {reason}")
    assert "\n" not in line


@pytest.mark.parametrize("method", ["warm_up", "capture"])
def test_a_graph_for_which_there_is_no_memory_is_not_captured_and_the_others_are_replayed(
    tiny_llama_dir: Path,
    traces: Traces,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    backend, calls = Fast(), iter(range(10))
    original = getattr(backend, method)

    def scarce(step: Any) -> Any:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(step)

    monkeypatch.setattr(backend, method, scarce)
    with caplog.at_level(logging.INFO, logger="runtime.serving.engine.cuda_graphs"):
        engine = BatchingEngine(load(tiny_llama_dir), LIMITS, graph_backend=backend)
    assert run(engine, make_request())[0][0] == generate(load(tiny_llama_dir))
    engine.close()
    assert sorted(engine._runner._graphs._plain) == [1, 2]  # type: ignore[union-attr]
    (line,) = (each for each in caplog.messages if "CUDA graph" in each)
    assert line.startswith("Captured 2 CUDA graphs of steps without adapters, of up to 2 sequences, in ")
    assert line.endswith(
        "0 MiB: there was no memory for 4 sequences; other steps are launched, which is slower"
    )


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("CAPTURE_S", -1.0, "no more were begun after -1 s"),
        ("MEMORY_SHARE", -0.1, "more would take over -10% of the free memory"),
    ],
)
def test_capturing_is_bounded_in_time_and_memory(
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    setting: str,
    value: float,
    reason: str,
) -> None:
    monkeypatch.setattr(cuda_graphs, setting, value)
    engine = BatchingEngine(load(tiny_llama_dir), LIMITS, graph_backend=Fast())
    assert run(engine, make_request())[0][0] == generate(load(tiny_llama_dir))
    engine.close()
    assert (
        "Captured 0 CUDA graphs of steps without adapters, of up to 0 sequences, in 0.0 s and 0 MiB: "
        f"{reason}" in caplog.text
    )


def test_a_graph_that_cannot_be_replayed_for_want_of_memory_is_launched(tiny_llama_dir: Path) -> None:
    backend = Fast()

    def capture(step: Callable[[], Tensor]) -> Callable[[], object]:
        calls = iter(range(1000))

        def scarce() -> None:
            if next(calls) == 3:
                raise RuntimeError("CUDA error: out of memory")
            backend.replays += 1
            step()

        return scarce

    backend.capture = capture  # type: ignore[method-assign]
    engine = BatchingEngine(load(tiny_llama_dir), LIMITS, graph_backend=backend)
    assert run(engine, make_request(max_new_tokens=40))[0][0] == generate(
        load(tiny_llama_dir), max_new_tokens=40
    )
    assert backend.replays == 3 * 3, "three of each before it is dropped"
    assert engine.stats().out_of_memory["decode"] == 0
    engine.close()


def test_a_sequence_that_becomes_nan_costs_its_own_answer_and_no_graph(traces: Traces) -> None:
    model = model_of("llama")
    prompt = some_prompts(5)[0]
    expected = generate(model, prompt, max_new_tokens=30)
    unused = next(token for token in range(3, 128) if token not in expected and token not in prompt)
    with torch.no_grad():
        model.get_input_embeddings().weight[unused] = torch.nan
    engine = BatchingEngine(
        model, EngineLimits(max_sequences=2, context_tokens=100, max_waiting=8), graph_backend=traces
    )
    bias = {unused: 1e9}
    for _ in range(4):  # its second token is chosen from NaN
        with pytest.raises(Exception, match="contains NaN or Inf"):
            run(engine, make_request((5, 6), logit_bias=bias))
    assert run(engine, make_request(prompt, max_new_tokens=30))[0][0] == expected
    engine.close()
    assert traces.replays > 10


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (20, [1, 2, 4, 8, 16, 20]),
        (32, [1, 2, 4, 8, 16, 24, 32]),
        (128, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]),
    ],
)
def test_graphs_are_captured_for_few_padded_numbers_of_tokens(most: int, sizes: list[int]) -> None:
    assert cuda_graphs.sizes(most) == sizes


def test_two_sets_are_forty_graphs_at_most() -> None:
    assert max(2 * len(cuda_graphs.sizes(most)) for most in range(1, 2000)) <= 40


@pytest.mark.parametrize(
    ("window", "starts", "lengths"),
    [(None, [10, 50, 50, 50], [7, 4, 5, 6]), (5, [12, 50, 50, 51], [5, 4, 5, 5])],
)
def test_drafts_read_what_their_sequence_has_before_them(
    window: int | None, starts: list[int], lengths: list[int]
) -> None:
    ranges = HostRanges([10, 50], [7, 6])
    assert cuda_graphs._by_token(ranges, [1, 3], window) == (starts, lengths)


@pytest.mark.parametrize("rows", [8, 32])
def test_steps_that_only_decode_replay_under_random_arrivals(tiny_llama_dir: Path, rows: int) -> None:
    engine = BatchingEngine(
        load(tiny_llama_dir),
        EngineLimits(max_sequences=rows, context_tokens=200, max_waiting=200),
        graph_backend=Fast(),
    )
    graphs: Any = engine._runner._graphs
    steps: list[tuple[bool, bool]] = []
    replay = graphs.run

    def counted(host: HostBatch, *chosen: Tensor | None) -> Tensor | None:
        logits: Tensor | None = replay(host, *chosen)
        steps.append((host.decode_tokens == len(host.ids), logits is not None))
        return logits

    graphs.run = counted
    draw = random.Random(rows)

    async def arrive() -> None:
        answers = []
        for number in range(3 * rows):
            prompt = tuple(draw.randrange(3, 500) for _ in range(draw.randint(5, 60)))
            request = make_request(prompt, max_new_tokens=draw.randint(5, 25), id=str(number))
            answers.append(asyncio.create_task(collect(engine.submit(request))))
            await asyncio.sleep(draw.expovariate(200))
        await asyncio.gather(*answers)

    asyncio.run(arrive())
    engine.close()
    decoding = [replayed for decodes, replayed in steps if decodes]
    assert len(decoding) > 20
    assert sum(decoding) >= 0.95 * len(decoding)


@pytest.mark.parametrize("family", [*SERVED, "tiny"])
def test_no_tensor_of_a_step_is_left_on_the_host_and_none_is_read_back(
    family: str, traces: Traces, tiny_llama_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    """Torch's "meta" device computes nothing, and like a GPU refuses operations that mix it with the CPU."""
    model = model_of(family) if family in SERVED else load(tiny_llama_dir)
    size = PoolSize(4, 100, (400,) * len(LayerKinds.of(model.config).kinds))
    runner = ModelRunner(model.to("meta"), size, graph_backend=None)
    bounds = StepBounds(4, 100, is_long=False)
    graphs = GraphCache(runner._forward, runner.adapters, runner.cache, bounds, backend=traces)
    if family == "tiny":
        runner.add_adapter("a", adapter_dirs["second"], strength=1)
    version = runner.adapters.version("a") if family == "tiny" else None
    ranges = (HostRanges([0, 100, 300, 200], [4, 5, 6, 3]),) * len(size.positions)
    reads = HostReads()
    with torch.inference_mode(), reads:
        host = HostBatch(
            ids=[1, 2, 3, 4, 5, 6],
            positions=[3, 4, 5, 0, 1, 2],
            decode_tokens=3,
            counts=[1, 1, 1, 3],
            ranges=ranges,
            logit_indices=[0, 1, 2, 5],
            adapters=[None] + 5 * [version],
            long=[False] * 6,
        )
        assert runner._execute(host).shape == (4, model.config.vocab_size)
        chosen = torch.zeros(2, dtype=torch.int64, device="meta")
        unread = replace(host, ids=[-2, 2, -1, 4, 5, 6])  # two that only the device has
        assert runner._execute(unread, chosen).shape == (4, model.config.vocab_size)
        decoding = replace(
            host,
            ids=[1, 2, 3],
            positions=[3, 4, 5],
            counts=[1] * 3,
            ranges=tuple(HostRanges(each.starts[:3], each.lengths[:3]) for each in ranges),
            logit_indices=[0, 1, 2],
            adapters=host.adapters[:3],
            long=[False] * 3,
        )
        inputs = graphs._inputs(4, adapted=version is not None)
        inputs.buffer.copy_(graphs._filled(decoding, 4), non_blocking=True)
        logits = graphs._step(inputs)
        assert (logits.device.type, len(logits)) == ("meta", 4)
    assert not reads.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("family", SERVED)
def test_cuda_graphs_answer_as_steps_without_graphs(family: str, oracle: Oracle) -> None:
    model = model_of(family).cuda()
    prompts = some_prompts(3, 40, 1, 70, 17)
    requests = [make_request(prompt, max_new_tokens=60, id=str(n)) for n, prompt in enumerate(prompts)]
    answers = []
    for backend in (None, CudaGraphs()):
        engine = BatchingEngine(
            copy.deepcopy(model),
            EngineLimits(max_sequences=6, context_tokens=400, max_waiting=8, draft_tokens=8),
            graph_backend=backend,
        )
        answers.append([run(engine, *requests), *(run(engine, each) for each in (*requests, *requests))])
        kept = engine._runner._graphs
        engine.close()
        oracle.known = [(*p, *ids) for p, (ids, _) in zip(prompts, answers[0][0], strict=True)][:2]
    assert answers[0] == answers[1]
    assert kept is not None
    assert kept._plain, "nothing was captured"
