"""A step launched before the tokens of the one before are read: the same answers, one wait a step.

A CPU computes a step while it is launched. So what is shown here is what the engine does with tokens that it
does not know, and in which order; a GPU is not needed for that.
"""

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.errors import UnavailableError
from runtime.serving.engine import sampling
from runtime.serving.engine.engine import BatchingEngine, EngineLimits
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.protocol import Constraint, Grammar, Request, Token
from runtime.serving.engine.scheduler import StepPlan
from runtime.transfers import HostCopy
from tests.families import model_of
from tests.serving.engine.calls import Oracle, collect, generate, load, make_request, run, run_at_once
from tests.serving.engine.capped import capped
from tests.serving.engine.models import longrope_model, some_prompts
from tests.serving.engine.test_cuda_graphs import Traces

LIMITS = EngineLimits(max_sequences=32, context_tokens=200, max_waiting=32)


@pytest.fixture(scope="module")
def ahead(tiny_llama_dir: Path, adapter_dirs: dict[str, Path]) -> Iterator[BatchingEngine]:
    """An engine that runs a step ahead of what it has read, with two adapters."""
    engine = BatchingEngine(load(tiny_llama_dir), LIMITS, overlap=True)
    for name, folder in adapter_dirs.items():
        engine.add_adapter(name, folder)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(tiny_llama_dir: Path, adapter_dirs: dict[str, Path]) -> Iterator[BatchingEngine]:
    engine = BatchingEngine(load(tiny_llama_dir), LIMITS, overlap=False)
    for name, folder in adapter_dirs.items():
        engine.add_adapter(name, folder)
    yield engine
    engine.close()


async def whole(engine: BatchingEngine, request: Request) -> list[Token]:
    """Return all of an answer; log probabilities are rounded, as they depend on what runs beside it."""
    return [
        Token(
            each.id, each.finish_reason, *_rounded(each.logprob), tuple(_rounded(*pair) for pair in each.top)
        )
        async for each in engine.submit(request)
    ]


def _rounded(*numbers: float | None) -> tuple[Any, ...]:
    return tuple(number if number is None else pytest.approx(number, abs=1e-4) for number in numbers)


def answers(engine: BatchingEngine, *requests: Request) -> list[list[Token]]:
    async def all_of_them() -> list[list[Token]]:
        return await asyncio.gather(*(whole(engine, request) for request in requests))

    return asyncio.run(all_of_them())


class Even:
    """A constraint that allows even tokens only."""

    def allowed(self) -> bytes:
        return bytes(token % 2 == 0 for token in range(512))

    def take(self, token: int) -> None:
        assert token % 2 == 0


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2, "top_logprobs": 3},
    {"temperature": 5.0, "top_p": 0.99, "seed": 3},  # needs more than the shortlist
    {"temperature": 2.0, "top_k": 300, "seed": 4},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.3},
    {"no_repeat_ngram_size": 1, "temperature": 1.0, "seed": 5},
    {"bad_words_ids": [[5, 6], [7]], "logit_bias": {9: 4.0}},
    {"min_new_tokens": 4, "stop_ids": frozenset(range(400)), "max_new_tokens": 30},
    {"grammar": Grammar(Constraint("regex", "", ""), Even), "temperature": 1.0, "seed": 6},
    {"stop_ids": frozenset(range(0, 512, 7)), "temperature": 3.0, "seed": 7, "max_new_tokens": 60},
    {"top_logprobs": 0},
]


def test_all_settings_give_the_answers_of_steps_one_after_another_alone_and_among_others(
    ahead: BatchingEngine, plain: BatchingEngine, adapter_dirs: dict[str, Path]
) -> None:
    prompts = some_prompts(*range(3, 34), vocabulary=512)
    names = [None, None, *adapter_dirs]
    requests = [
        make_request(
            prompt, id=str(n), adapter=names[n % 4], **{"max_new_tokens": 1 + n % 19} | KINDS[n % len(KINDS)]
        )
        for n, prompt in enumerate(prompts)
    ]
    alone = [answers(plain, request)[0] for request in requests]
    assert answers(ahead, *requests) == alone
    assert [answers(ahead, request)[0] for request in requests[: len(KINDS)]] == alone[: len(KINDS)]
    assert {tokens[-1].finish_reason for tokens in alone} == {"stop", "length"}
    assert (ahead.stats().running, ahead.stats().kv_cache_share) == (0, 0)


class Watched:
    """Notes when steps are launched and tokens are read."""

    def __init__(self, engine: BatchingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.plans: list[StepPlan] = []
        self.copies = 0
        watched, launch = self, engine._runner.run

        class Noted(HostCopy):
            def __init__(self, tensor: Tensor) -> None:
                super().__init__(tensor)
                self._number, watched.copies = watched.copies, watched.copies + 1

            def read(self) -> Tensor:
                watched.events.append(f"read {self._number}")
                return super().read()

        def run_plan(plan: StepPlan, *chosen: Tensor) -> Tensor:
            self.events.append(f"launch {len(self.plans)}")
            self.plans.append(plan)
            return launch(plan, *chosen)

        monkeypatch.setattr(sampling, "HostCopy", Noted)
        monkeypatch.setattr(engine._runner, "run", run_plan)


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_read_and_none_for_nothing(
    ahead: BatchingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(ahead, monkeypatch)
    assert len(answers(ahead, make_request(max_new_tokens=5, temperature=1.0))[0]) == 6
    expected = [event for n in range(1, 5) for event in (f"launch {n}", f"read {n - 1}")]
    assert watched.events == ["launch 0", *expected, "read 4"]


def test_a_stop_costs_one_token_of_work(ahead: BatchingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = [token.id for token in answers(ahead, make_request(max_new_tokens=30))[0]]
    watched = Watched(ahead, monkeypatch)
    stopped = make_request(max_new_tokens=30, stop_ids=frozenset({text[8]}))
    assert [token.id for token in answers(ahead, stopped)[0]] == [*text[: text.index(text[8])], None]
    assert len(watched.plans) == text.index(text[8]) + 1 + 1


def test_a_cpu_reads_the_tokens_of_each_step_at_once(
    plain: BatchingEngine, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(plain, monkeypatch)
    answers(plain, make_request(max_new_tokens=3))
    assert watched.events == [f"{what} {n}" for n in range(3) for what in ("launch", "read")]


def test_the_cache_has_nothing_of_a_token_that_was_computed_for_nothing(
    ahead: BatchingEngine, plain: BatchingEngine
) -> None:
    (prompt,) = some_prompts(40, vocabulary=512)
    text = [token.id for token in answers(plain, make_request(prompt, max_new_tokens=30))[0]]
    stop = make_request(prompt, max_new_tokens=30, stop_ids=frozenset({text[9]}))
    answers(ahead, stop)
    known = text[: text.index(text[9])]
    sequence = ahead._scheduler._pool.ended[-1]
    assert sequence.ids == [*prompt, *known][: sequence.filled]
    assert sequence.filled == len(prompt) + len(known)
    follow_up = make_request((*prompt, *known, 77, 78, 79))  # type: ignore[arg-type]
    assert answers(ahead, follow_up) == answers(plain, follow_up)


def test_a_cancelled_sequence_ends_by_the_next_step_and_the_others_answer_as_alone(
    ahead: BatchingEngine, plain: BatchingEngine
) -> None:
    prompts = some_prompts(9, 14, vocabulary=512)
    stays = make_request(prompts[0], max_new_tokens=60, id="stays", temperature=1.0, seed=3)

    async def leave_one_of_two() -> list[Token]:
        leaving = ahead.submit(make_request(prompts[1], max_new_tokens=150, id="leaves"))
        staying = asyncio.create_task(whole(ahead, stays))
        for _ in range(5):
            await anext(leaving)
        ahead.cancel("leaves")
        assert [token.finish_reason async for token in leaving][-1] == "cancelled"
        return await staying

    assert asyncio.run(leave_one_of_two()) == answers(plain, stays)[0]
    again = make_request(prompts[1], max_new_tokens=20)
    assert answers(ahead, again) == answers(plain, again)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_text_equals_generate_where_extents_move_windows_pass_and_sequences_are_put_off(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    prompts = some_prompts(8, 12, 9, 30)
    prompts.append((*prompts[3], 5, 6, 7))
    expected = [generate(model, prompt) for prompt in prompts]
    monkeypatch.setattr("runtime.serving.engine.scheduler.LEAST_ROOM", 1)
    monkeypatch.setattr("runtime.serving.engine.pool_map.LEAST_GROWTH", 2)
    monkeypatch.setattr("runtime.serving.engine.engine.PREFILL_ONLY_TOKENS", 24)
    monkeypatch.setattr("runtime.serving.engine.engine.CHUNK_TOKENS", 16)
    windows = BatchingEngine(copy.deepcopy(model), EngineLimits(1, 8, 1))._runner.cache.kinds.windows
    positions = tuple(56 if window is None else 46 for window in windows)
    engine = BatchingEngine(model, EngineLimits(8, 56, 8, positions=positions), overlap=True)
    requests = [make_request(prompt, id=str(n)) for n, prompt in enumerate(prompts)]
    together = [ids for ids, _ in run_at_once(engine, *requests)]
    again = [run(engine, request)[0][0] for request in requests[3:]]
    stats = engine.stats()
    engine.close()
    assert (together, again) == (expected, expected[3:])
    assert stats.preemptions > 0
    assert stats.kv_cache_share == 0


@pytest.mark.parametrize("drafts", [0, 3])
def test_captured_steps_take_tokens_that_only_the_device_has(
    drafts: int, monkeypatch: pytest.MonkeyPatch, oracle: Oracle
) -> None:
    monkeypatch.setattr(Kernels, "find", lambda: None)  # a trace does not see what they do
    model, traces = longrope_model(), Traces()
    prompts = some_prompts(5, 65, 48)
    expected = [generate(model, prompt) for prompt in prompts]
    oracle.known = [(*prompt, *answer) for prompt, answer in zip(prompts, expected, strict=True)]
    limits = EngineLimits(max_sequences=2, context_tokens=200, max_waiting=8, draft_tokens=drafts)
    engine = BatchingEngine(copy.deepcopy(model), limits, graph_backend=traces, overlap=True)
    requests = [make_request(prompt, id=str(n)) for n, prompt in enumerate(prompts)]
    sampled = [
        make_request(prompt, temperature=3.0, top_p=0.999, seed=n, id=str(n))
        for n, prompt in enumerate(prompts)
    ]
    assert [ids for ids, _ in run(engine, *requests)] == expected
    assert [run(engine, request)[0][0] for request in requests] == expected
    together = [ids for ids, _ in run(engine, *sampled)]
    assert [run(engine, request)[0][0] for request in sampled] == together
    assert (engine.stats().accepted_tokens > 0) == (drafts > 0)
    engine.close()
    assert traces.replays > 40


def test_a_sequence_with_nan_ends_alone(ahead: BatchingEngine, plain: BatchingEngine) -> None:
    requests = [
        make_request(prompt, id=str(n)) for n, prompt in enumerate(some_prompts(4, 9, vocabulary=512))
    ]
    expected = run(plain, *requests)
    unused = next(token for token in range(3, 512) if all(token not in ids for ids, _ in expected))
    weight = ahead._runner._model.get_input_embeddings().weight
    kept = weight[unused].clone()

    async def three() -> list[Any]:
        becomes = make_request((5, 6), logit_bias={unused: 1e9}, id="NaN")
        return await asyncio.gather(
            *(collect(ahead.submit(each)) for each in (becomes, *requests)), return_exceptions=True
        )

    try:
        with torch.no_grad():
            weight[unused] = torch.nan
        failed, *answered = asyncio.run(three())
    finally:
        with torch.no_grad():
            weight[unused] = kept
    assert isinstance(failed, UnavailableError)
    assert answered == expected
    assert run(ahead, *requests) == expected


def test_a_step_that_does_not_fit_is_divided_with_the_tokens_of_the_one_before(
    ahead: BatchingEngine, plain: BatchingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = some_prompts(*range(3, 15), vocabulary=512)
    requests = [
        make_request(prompt, id=str(n), max_new_tokens=10 + n, temperature=1.0 * (n % 2), seed=n)
        for n, prompt in enumerate(prompts)
    ]
    requests[4:6] = [
        make_request(prompts[n], id=str(n), stop_ids=frozenset(range(0, 512, 3))) for n in (4, 5)
    ]
    expected = [run(plain, request)[0] for request in requests]
    launch, refused = ahead._runner.run, []

    def runs_out(plan: StepPlan, *chosen: Tensor) -> Tensor:
        if len(plan.decode) > 7 or (len(plan.decode) == 3 and len(refused) < 9):
            refused.append(chosen)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(plan, *chosen)

    monkeypatch.setattr(ahead._runner, "run", runs_out)
    monkeypatch.setattr("runtime.serving.engine.out_of_memory.REMEMBER_S", 0.0)
    assert run(ahead, *requests) == expected
    assert any(refused), "some had tokens on the device"


def test_logits_that_do_not_fit_together_are_sampled_row_by_row(
    ahead: BatchingEngine, plain: BatchingEngine
) -> None:
    requests = [
        make_request(prompt, id=str(n), **KINDS[3] | {"seed": n})
        for n, prompt in enumerate(some_prompts(3, 9, 5, 12, vocabulary=512))
    ]
    expected = [run(plain, request)[0] for request in requests]
    with capped(ahead, 3 * 512 * 8, "_choose") as chooses, capped(ahead, 512 * 8, "_settle") as settles:
        assert run(ahead, *requests) == expected
    assert chooses.refused > 0
    assert settles.refused > 0, "a row needed more than the shortlist, when another step had its token"
