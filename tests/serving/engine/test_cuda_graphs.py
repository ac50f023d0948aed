"""CUDA graphs: the answers are those of steps without graphs, whatever a graph fixes.

On a CPU the backend traces the operations of a step and repeats exactly these on the same memory, as a CUDA
graph does: a number that a step takes from the host, or memory that moves later, shows in the answers.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from runtime.serving.engine import cuda_graphs
from runtime.serving.engine.batch import HostBatch, SlotChunk, SlotCopy
from runtime.serving.engine.cuda_graphs import Block, CudaGraphs, GraphKey
from runtime.serving.engine.engine import BatchingEngine, EngineLimits
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.model_runner import ModelRunner
from tests.families import SERVED, model_of
from tests.host_reads import HostReads
from tests.serving.engine.calls import Oracle, generate, load, make_request, run
from tests.serving.engine.models import longrope_model, some_prompts

FORBIDDEN = {"_local_scalar_dense", "nonzero", "lift_fresh", "lift_fresh_copy", "masked_select"}
"""Operations that wait for the device or bring numbers from the host: a CUDA graph holds none."""


class Traces:
    """Captures the operations of a step, and repeats them."""

    def __init__(self) -> None:
        self.replays = self.captured = self.resets = 0
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

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    monkeypatch.setattr(cuda_graphs, "CAPTURE_AFTER", 2)
    monkeypatch.setattr(cuda_graphs, "MIN_REACH", 32)
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
        EngineLimits(max_sequences=6, context_tokens=200, max_waiting=8, draft_tokens=8),
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
        EngineLimits(max_sequences=5, context_tokens=400, max_waiting=8),
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
        EngineLimits(max_sequences=8, context_tokens=200, max_waiting=8),
        graph_backend=traces,
    )
    yield made
    made.close()


@pytest.fixture
def plain(tiny_llama_dir: Path) -> Iterator[BatchingEngine]:
    made = BatchingEngine(
        load(tiny_llama_dir), EngineLimits(max_sequences=8, context_tokens=200, max_waiting=8)
    )
    yield made
    made.close()


def test_adapters_come_and_go_between_graphs(
    engine: BatchingEngine, plain: BatchingEngine, traces: Traces, adapter_dirs: dict[str, Path]
) -> None:
    first, second = adapter_dirs.values()
    for change in (
        lambda each: each.add_adapter("a", first),
        lambda each: each.add_adapter("b", second),
        lambda each: each.remove_adapter("a"),
        lambda each: each.add_adapter("a", second, strength=0.5),
    ):
        change(engine)
        change(plain)
        names = [None, *engine.stats().adapters, None, *engine.stats().adapters]
        requests = [make_request(adapter=name, id=str(number)) for number, name in enumerate(names)]
        before = traces.replays
        assert run(engine, *requests) == run(plain, *requests)
        assert [run(engine, each) for each in requests] == [run(plain, each) for each in requests]
        assert traces.replays > before + 20
    assert traces.resets == 4


def test_more_adapters_than_one_product_takes_run_without_graphs(
    engine: BatchingEngine, plain: BatchingEngine, traces: Traces, adapter_dirs: dict[str, Path]
) -> None:
    names = [f"a{number}" for number in range(25)]
    for each in (engine, plain):
        for number, name in enumerate(names):
            each.add_adapter(name, adapter_dirs["second"], strength=number / 25)
    requests = [make_request(adapter=name, id=name) for name in names[-4:]]
    assert run(engine, *requests) == run(plain, *requests)
    assert not traces.captured
    assert run(engine, make_request()) == run(plain, make_request())
    assert traces.captured, "requests without an adapter are still captured"


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
    engine: BatchingEngine,
    plain: BatchingEngine,
    traces: Traces,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    # passes two bounds, twice in the same slot
    request = make_request(some_prompts(60, vocabulary=512)[0], max_new_tokens=40)
    expected = run(plain, request)
    original = getattr(traces, method)

    def scarce(step: Any) -> Any:
        if traces.captured == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(step)

    monkeypatch.setattr(traces, method, scarce)
    assert run(engine, request) == expected
    replays = traces.replays
    assert run(engine, request) == expected
    assert traces.captured == 1
    assert traces.replays > replays
    assert engine.stats().out_of_memory["divided"] == 0
    assert [each for each in caplog.messages if "CUDA graph" in each] == [
        "No memory for a CUDA graph: 1 are kept, other steps are launched"
    ]


def test_a_graph_that_cannot_be_replayed_for_want_of_memory_is_launched(
    engine: BatchingEngine, plain: BatchingEngine, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(max_new_tokens=40)
    expected = run(plain, request)
    original = traces.capture

    def capture(step: Any) -> Callable[[], object]:
        replay, calls = original(step), iter(range(1000))

        def scarce() -> None:
            if next(calls) == 3:
                raise RuntimeError("CUDA error: out of memory")
            replay()

        return scarce

    monkeypatch.setattr(traces, "capture", capture)
    assert run(engine, request) == expected
    assert traces.replays > 0
    assert engine.stats().out_of_memory["decode"] == 0


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


def test_the_graph_replayed_longest_ago_is_dropped_first(
    engine: BatchingEngine, plain: BatchingEngine, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    request = make_request(max_new_tokens=150)  # passes five bounds
    expected = run(plain, request)
    assert run(engine, request) == expected
    captured = traces.captured
    assert captured >= 5
    assert run(engine, request) == expected
    assert traces.captured == 2 * captured
    kept = engine._runner._graphs
    assert kept is not None
    assert len(kept._kept) == 2


@pytest.mark.parametrize(
    ("slots", "blocks"),
    [
        ([0], [(0, 1)]),
        ([5], [(5, 1)]),
        ([0, 1, 2], [(0, 4)]),
        ([3, 4], [(3, 1), (4, 1)]),
        ([4, 5], [(4, 2)]),
        ([0, 1, 3, 5, 6, 8, 9], [(0, 8), (8, 2)]),
        ([0, 1, 3, 5, 6, 7, 8, 9], [(0, 10)]),
        ([0, 1, 2, 9], [(0, 4), (9, 1)]),
    ],
)
def test_blocks_are_aligned_and_half_full_so_that_few_graphs_serve_all_sequences(
    slots: list[int], blocks: list[tuple[int, int]]
) -> None:
    assert cuda_graphs._blocks(slots, most=10) == blocks


@pytest.mark.parametrize(
    ("positions", "reach"), [(1, 256), (256, 256), (257, 512), (2048, 2048), (2049, 2560), (90_000, 98_304)]
)
def test_a_bound_on_lengths_is_a_quarter_too_long_at_most(positions: int, reach: int) -> None:
    assert cuda_graphs._reach(positions) == reach


@pytest.mark.parametrize("family", [*SERVED, "tiny"])
def test_no_tensor_of_a_step_is_left_on_the_host_and_none_is_read_back(
    family: str, traces: Traces, tiny_llama_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    """Torch's "meta" device computes nothing, and like a GPU refuses operations that mix it with the CPU."""
    model = model_of(family) if family in SERVED else load(tiny_llama_dir)
    runner = ModelRunner(model.to("meta"), slots=4, positions=100, graph_backend=traces)
    if family == "tiny":
        runner.add_adapter("a", adapter_dirs["second"], strength=1)
    version = runner.adapters.version("a") if family == "tiny" else None
    numbers = {"ids": [1, 2, 3, 4, 5, 6], "positions": [3, 4, 5, 0, 1, 2], "decode_slots": [0, 1, 3]}
    rest = {"adapters": [None] + 5 * [version], "long": [False] * 6, "copies": [SlotCopy(0, 2, 3)]}
    reads = HostReads()
    with torch.inference_mode(), reads:
        host = HostBatch(**numbers, **rest, chunks=(SlotChunk(3, 2, 0, 3),), logit_indices=[0, 1, 2, 5])
        assert runner._execute(host).shape == (4, model.config.vocab_size)
        assert runner._graphs is not None
        one, some = Block(2, 1, 32), (Block(0, 1, 64), Block(2, 2, 32))
        for key in (GraphKey(some, 1, version is not None, False), GraphKey((one,), 5, False, False)):
            logits = runner._graphs._step(key, runner._graphs._inputs(key))
            assert (logits.device.type, len(logits)) == ("meta", key.tokens)
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
    assert kept._kept, "nothing was captured"
