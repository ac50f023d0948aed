"""A request that asks for more memory than there is ends alone; a capped allocator says how much there is."""

import asyncio
import copy
import gc
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from runtime.errors import CapacityError, TooLargeError, UnavailableError
from runtime.serving.engine import out_of_memory
from runtime.serving.engine.backends.simple import SimpleEngine
from runtime.serving.engine.engine import BatchingEngine, EngineLimits
from runtime.serving.engine.out_of_memory import MemoryLimits, divide
from runtime.serving.engine.protocol import Constraint, Grammar, Request, Sampling
from runtime.serving.engine.scheduler import Draft, PromptChunk, Sequence, StepPlan
from tests.conftest import write_tiny_tokenizer
from tests.families import model_of
from tests.serving.conftest import Process
from tests.serving.engine.calls import collect, generate, load, make_request, run
from tests.serving.engine.capped import ProcessCaps, capped
from tests.serving.engine.models import some_prompts

SCORES = 4 * 4
"""Bytes of the attention scores of one token and position in the model below: 4 heads of float32."""
INNER = 384
GATE_UP = 2 * INNER * 4
"""Bytes of a token in the middle of its MLP."""
LIMITS = EngineLimits(max_sequences=12, context_tokens=512, max_waiting=32)


@pytest.fixture(scope="module")
def model() -> Any:
    """Gemma 2: its soft cap is no part of any attention kernel, so scores are (heads, chunk, positions)."""
    return model_of("gemma2", intermediate_size=INNER)


@pytest.fixture(scope="module")
def uncapped(model: Any) -> Iterator[BatchingEngine]:
    """What test_engine.py compares with transformers; its answers are those that a cap must not change."""
    made = BatchingEngine(copy.deepcopy(model), LIMITS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(model: Any) -> Iterator[BatchingEngine]:
    made = BatchingEngine(copy.deepcopy(model), LIMITS)
    yield made
    made.close()


@pytest.fixture
def engine(shared: BatchingEngine) -> BatchingEngine:
    """An engine that has met no request yet: nothing is cached, and nothing remembered that did not fit."""
    shared._queue.call(lambda: shared._scheduler.invalidate(everything=True))
    shared._memory = MemoryLimits()
    return shared


def answers(engine: BatchingEngine | SimpleEngine, *requests: Request) -> list[Any]:
    """Return answers and failures in the order of the requests, all sent at once."""

    async def all_of_them() -> list[Any]:
        streams = [collect(engine.submit(request)) for request in requests]
        return await asyncio.gather(*streams, return_exceptions=True)

    return asyncio.run(all_of_them())


def test_one_that_asks_for_too_much_ends_alone_and_the_others_answer_as_alone(
    engine: BatchingEngine, uncapped: BatchingEngine
) -> None:
    *short, long = some_prompts(3, 80, 1, 17, 60, 33, 200)
    requests = [make_request(prompt, id=str(n)) for n, prompt in enumerate(short)]
    expected = [run(uncapped, request)[0] for request in requests]
    requests.insert(3, make_request(long, id="long"))  # neither the oldest nor the newest
    with capped(engine, 32 * 128 * SCORES, "step"):
        got = answers(engine, *requests)
    failure = got.pop(3)
    assert got == expected
    assert isinstance(failure, TooLargeError)
    assert failure.code == "out_of_memory"
    assert "send a shorter prompt" in str(failure)
    token = int(re.findall(r"at token (\d+)", str(failure))[0])
    assert 128 < token <= 128 + 32, "the first position whose scores do not fit is 129"


def test_twenty_that_ask_for_too_much_do_not_end_the_server(
    engine: BatchingEngine, uncapped: BatchingEngine
) -> None:
    *long, short = (make_request(prompt) for prompt in some_prompts(*[200] * 20, 40))
    with capped(engine, 32 * 128 * SCORES, "step"):
        for request in long:
            assert isinstance(answers(engine, request)[0], TooLargeError)
        assert engine.stats().alive
        assert (engine.stats().running, engine.stats().kv_cache_share) == (0, 0)
        assert run(engine, short) == run(uncapped, short)
    assert engine.stats().out_of_memory["prompt"] == 20
    assert run(engine, long[0]) == run(uncapped, long[0])


def test_a_prompt_that_fits_in_smaller_chunks_is_answered_and_the_next_does_not_run_out(
    engine: BatchingEngine, uncapped: BatchingEngine
) -> None:
    first, second, short = (make_request(prompt) for prompt in some_prompts(256, 256, 100))
    with capped(engine, 80 * 256 * SCORES, "step") as allocator:
        assert run(engine, first) == run(uncapped, first)
        refused = allocator.refused
        assert refused > 0
        assert 32 <= engine.stats().prompt_tokens_limit < 256
        assert run(engine, second) == run(uncapped, second)
        assert run(engine, short) == run(uncapped, short)
    assert allocator.refused == refused
    assert engine.stats().out_of_memory["prompt"] == 0
    assert engine.stats().out_of_memory["divided"] == refused


def test_a_failed_pass_leaves_no_tensor_behind(engine: BatchingEngine) -> None:
    long = some_prompts(200)[0]
    gc.collect()
    gc.disable()
    try:
        with capped(engine, 32 * 128 * SCORES, "step") as allocator:
            assert isinstance(answers(engine, make_request(long))[0], TooLargeError)
            engine._queue.call(lambda: None)
            assert len(allocator.made) > 200
            assert allocator.alive == 0
    finally:
        gc.enable()


def test_sequences_that_cannot_decode_together_decode_in_several_passes(
    engine: BatchingEngine, uncapped: BatchingEngine
) -> None:
    requests = [make_request(prompt, id=str(n)) for n, prompt in enumerate(some_prompts(*range(3, 15)))]
    expected = [run(uncapped, request)[0] for request in requests]
    with capped(engine, 7 * GATE_UP, "step") as allocator:
        short = [replace(request, prompt_ids=request.prompt_ids[:7]) for request in requests]
        assert answers(engine, *short) == [run(uncapped, request)[0] for request in short]
    assert allocator.refused < 30, "what did not fit once is not tried at every step"
    with capped(engine, 32 * GATE_UP, "step"):
        assert answers(engine, *requests) == expected


def test_a_drafted_step_that_does_not_fit_runs_without_its_draft(model: Any, oracle: Any) -> None:
    prompt = some_prompts(9)[0]
    expected = generate(model, prompt, max_new_tokens=24)
    oracle.known = [(*prompt, *expected)]
    limits = EngineLimits(max_sequences=2, context_tokens=128, max_waiting=4, draft_tokens=15)
    engine = BatchingEngine(copy.deepcopy(model), limits)
    with capped(engine, 7 * GATE_UP, "step") as allocator:
        assert run(engine, make_request(prompt, max_new_tokens=24)) == [(expected, "length")]
    assert allocator.refused == 1
    engine.close()


def test_logits_that_do_not_fit_together_are_sampled_row_by_row() -> None:
    half = model_of("gemma2", vocab_size=1024).to(torch.bfloat16)
    engine = BatchingEngine(half, EngineLimits(max_sequences=8, context_tokens=128, max_waiting=8))
    sampling = {"temperature": 1.0, "max_new_tokens": 6}
    prompts = some_prompts(3, 9, 5, 12)
    requests = [make_request(each, id=str(n), seed=n, **sampling) for n, each in enumerate(prompts)]
    expected = [run(engine, request)[0] for request in requests]
    with capped(engine, 3 * 1024 * 4, "_choose") as allocator:  # three rows in float32
        assert answers(engine, *requests) == expected
        assert allocator.refused > 0
        allocator.most_bytes = 1024  # not even one
        (failed,) = answers(engine, make_request(some_prompts(60)[0], temperature=1.0))
    assert isinstance(failed, TooLargeError)
    assert engine.stats().out_of_memory["sampling"] == 1
    assert run(engine, requests[0])[0] == expected[0]
    engine.close()


def test_an_engine_that_can_run_nothing_any_more_stops(model: Any) -> None:
    engine = BatchingEngine(copy.deepcopy(model), LIMITS)
    with capped(engine, 0, "step"):
        for _ in range(3):
            (failed,) = answers(engine, make_request((5, 17, 41)))
            assert isinstance(failed, UnavailableError)
        engine._thread.join(60)
        assert not engine.stats().alive


class Unruly:
    """A constraint whose code fails."""

    def allowed(self) -> bytes:
        raise ValueError("no such state")

    def take(self, token: int) -> None:
        raise AssertionError("no token was allowed")


def refuse_to_begin() -> Any:
    raise MemoryError


@pytest.mark.parametrize("begin", [Unruly, refuse_to_begin])
def test_a_constraint_that_fails_ends_its_own_request_however_often(
    engine: BatchingEngine, uncapped: BatchingEngine, begin: Any
) -> None:
    bad = Request(
        (5, 6), Sampling(max_new_tokens=4, grammar=Grammar(Constraint("regex", "x", ""), begin)), id="bad"
    )
    good = make_request((5, 17, 41), max_new_tokens=6)
    expected = run(uncapped, good)[0]
    for _ in range(LIMITS.max_sequences + 2):
        failed, answered = answers(engine, bad, good)
        assert isinstance(failed, UnavailableError)
        assert answered == expected
    assert engine.stats().alive
    assert engine.stats().running == 0


def test_an_adapter_that_does_not_fit_is_in_no_layer_and_the_others_answer_on(
    tiny_llama_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    limits = EngineLimits(max_sequences=4, context_tokens=256, max_waiting=8)
    engine = BatchingEngine(load(tiny_llama_dir), limits)
    for name in ("a", "b"):
        engine.add_adapter(name, adapter_dirs["my.first-one"])
    requests = [make_request(adapter=name, id=str(name)) for name in ("a", "b", None)]
    expected = run(engine, *requests)
    stacks = [layer.stacks for layer in engine._runner.adapters._layers if layer.stacks is not None]
    largest = max(each.rows.numel() for each in stacks)
    for most_bytes in (64, largest * 4):  # at its first tensor, at the first layer that would have to grow
        with capped(engine, most_bytes, "add_adapter", of=engine._runner) as allocator:
            with pytest.raises(CapacityError, match="adapter c: no memory is left for it; unload another"):
                engine.add_adapter("c", adapter_dirs["second"])
            assert allocator.refused == 1
            gc.collect()
            assert allocator.alive == 0
        assert engine.stats().adapters == ("a", "b")
        assert run(engine, *requests) == expected
    assert engine.stats().out_of_memory["adapter"] == 2
    engine.add_adapter("c", adapter_dirs["second"])
    assert run(engine, *requests) == expected
    engine.close()


@pytest.fixture
def simple(model: Any) -> Iterator[SimpleEngine]:
    made = SimpleEngine(copy.deepcopy(model), context_tokens=512, max_waiting=8)
    yield made
    made.close()


def test_the_simple_engine_answers_in_smaller_chunks_and_refuses_what_needs_too_much(
    simple: SimpleEngine, uncapped: BatchingEngine
) -> None:
    fits, again, long, short = (make_request(prompt) for prompt in some_prompts(225, 225, 400, 9))
    with capped(simple, 80 * 256 * SCORES, "_end_of") as allocator:
        assert run(simple, fits) == run(uncapped, fits)
        refused = allocator.refused
        assert refused > 0
        assert run(simple, again) == run(uncapped, again)
        assert allocator.refused == refused
        allocator.most_bytes = 32 * 256 * SCORES
        gc.collect()
        gc.disable()
        try:
            (failed,) = answers(simple, long)
            simple._queue.call(lambda: None)
            assert allocator.alive == 0
        finally:
            gc.enable()
        assert isinstance(failed, TooLargeError)
        assert run(simple, short) == run(uncapped, short)
    assert simple.stats().out_of_memory["prompt"] == 1
    assert simple.stats().alive


def test_an_adapter_that_does_not_fit_leaves_the_simple_engine_as_it_was(
    tiny_llama_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    engine = SimpleEngine(load(tiny_llama_dir), context_tokens=256, max_waiting=8)
    expected = run(engine, make_request())
    with capped(engine, 1024, "_add"):
        with pytest.raises(CapacityError, match="adapter c: no memory is left for it"):
            engine.add_adapter("c", adapter_dirs["second"])
        assert engine.stats().adapters == ()
    assert run(engine, make_request()) == expected
    assert not any("lora" in name for name, _ in engine._adapters.model.named_modules())
    engine.add_adapter("c", adapter_dirs["second"])
    assert run(engine, make_request(adapter="c")) != expected
    assert engine.stats().out_of_memory["adapter"] == 1
    engine.close()


def sequence(tokens: int, *, filled: int = 0) -> Sequence:
    return Sequence(None, list(range(tokens)), tokens, tokens + 100, filled=filled)


def test_a_plan_is_divided_down_to_one_sequence_and_every_sequence_stays_in_it() -> None:
    one, two, three = (sequence(n) for n in (40, 50, 60))
    chunks = (PromptChunk(one, 0, 40), PromptChunk(two, 20, 30))
    decode, prompts = divide(StepPlan((three,), chunks))
    assert (decode, prompts) == (StepPlan((three,), ()), StepPlan((), chunks))
    (smaller,) = divide(prompts)
    assert smaller == StepPlan((), (PromptChunk(one, 0, 35),))
    short = StepPlan((), (PromptChunk(one, 0, 10), PromptChunk(two, 20, 5)))
    assert divide(short) == tuple(StepPlan((), (chunk,)) for chunk in short.chunks)
    assert divide(StepPlan((one, two, three), ())) == (StepPlan((one,), ()), StepPlan((two, three), ()))
    assert divide(StepPlan((), (), (Draft(one, (1, 2)),))) == (StepPlan((one,), ()),)
    assert divide(StepPlan((), (PromptChunk(one, 0, 32),))) == divide(decode) == ()


def test_what_did_not_fit_is_remembered_for_prompts_as_long_and_only_for_a_while() -> None:
    now = [0.0]
    memory = MemoryLimits(lambda: now[0])
    memory.lower(StepPlan((), (PromptChunk(sequence(900), 488, 512),)), decode_fits=False)
    assert (memory.most_tokens(1000), memory.most_tokens(1200), memory.most_tokens(999) > 512) == (
        256,
        256,
        True,
    )
    memory.lower_prompt(256, 1100)
    assert (memory.most_tokens(1000), memory.most_tokens(1100)) == (256, 128)
    assert memory.prompt_tokens == 128
    memory.lower_prompt(200, 900)
    assert (memory.most_tokens(900), memory.most_tokens(1100)) == (100, 100)
    now[0] = out_of_memory.REMEMBER_S
    assert memory.most_tokens(2000) > 512
    assert memory.prompt_tokens == 0


def test_refused_requests_are_logged_up_to_a_rate_and_the_rest_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    memory = MemoryLimits(lambda: now[0])
    for number in range(100):
        memory.refuse(str(number), "prompt", tokens=500)
    assert len(caplog.messages) == out_of_memory.LINES
    assert "Request 0 is refused: out of memory at its token 500 (prompt)" in caplog.messages[0]
    now[0] = out_of_memory.LOG_S
    memory.refuse("later", "prompt", tokens=500)
    assert f"and {100 - out_of_memory.LINES} such lines that were not logged" in caplog.messages[-1]
    assert memory.counts["prompt"] == 101


@pytest.mark.slow
def test_a_server_refuses_five_prompts_that_cannot_be_allocated_and_answers_the_others_exactly(
    tmp_path: Path, process_caps: ProcessCaps
) -> None:
    """torch's own allocator fails, for what is larger than the scores of 32 tokens with 128 positions."""
    write_tiny_tokenizer(tmp_path)
    model_of("gemma2", vocab_size=512, num_attention_heads=64, head_dim=8).save_pretrained(str(tmp_path))
    *long, one, two, three = some_prompts(*[200] * 5, 20, 31, 42)
    site = Process.serve(tmp_path, environ=process_caps.environ)
    try:
        site.wait_ready(120)

        def ask(prompt: tuple[int, ...]) -> httpx.Response:
            body = {"model": tmp_path.name, "prompt": prompt, "max_tokens": 64, "temperature": 0}
            return httpx.post(f"{site.url}/v1/completions", json=body | {"ignore_eos": True}, timeout=60)

        expected = [ask(prompt).json()["choices"] for prompt in (one, two, three)]
        process_caps.set(site.process.pid, 32 * 128 * 64 * 4)
        with ThreadPoolExecutor() as pool:
            answered = pool.map(ask, (one, two, three))
            refused = [ask(prompt) for prompt in long]
        assert [(each.status_code, each.json()["error"]["code"]) for each in refused] == [
            (413, "out_of_memory")
        ] * 5
        assert [answer.json()["choices"] for answer in answered] == expected
        assert site.get("/livez").status_code == site.get("/readyz").status_code == 200
        assert site.stop() == 0
    finally:
        site.close()
