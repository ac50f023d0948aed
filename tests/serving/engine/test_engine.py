"""The batching engine: answers do not depend on what runs beside them, in any architecture it runs."""

import asyncio
import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from runtime.errors import ConfigError, RequestError, UnavailableError
from runtime.serving.engine import lora
from runtime.serving.engine.engine import CHUNK_TOKENS, PREFILL_ONLY_TOKENS, BatchingEngine, EngineLimits
from runtime.serving.engine.extents import Move
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.kv_pool import LayerKinds
from runtime.serving.engine.protocol import Start
from runtime.serving.engine.scheduler import StepPlan
from tests.families import SERVED, model_of
from tests.serving.engine.calls import (
    WRONG_TOKEN,
    collect,
    generate,
    load,
    make_request,
    run,
    run_at_once,
)
from tests.serving.engine.models import longrope_model, some_prompts


@pytest.mark.parametrize("family", SERVED)
def test_greedy_equals_generate_alone_and_among_others(family: str) -> None:
    model = model_of(family)
    prompts = some_prompts(3, 40, 1, 70, 17, 300)
    expected = [generate(model, prompt) for prompt in prompts]
    engine = BatchingEngine(model, EngineLimits(max_sequences=4, context_tokens=400, max_waiting=8))
    requests = [make_request(prompt, id=str(n)) for n, prompt in enumerate(prompts)]
    alone = [run(engine, request)[0][0] for request in requests]
    together = [ids for ids, _ in run(engine, *requests)]
    engine.close()
    assert alone == expected
    assert together == expected
    assert len({token for ids in expected for token in ids}) > 8, "the model repeats itself: proves nothing"


@pytest.mark.parametrize("family", SERVED)
def test_greedy_equals_generate_where_extents_move_windows_pass_and_sequences_are_put_off(
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
    windows = LayerKinds.of(model.config).windows
    positions = tuple(56 if window is None else 46 for window in windows)
    engine = BatchingEngine(model, EngineLimits(8, 56, 8, positions=positions))
    moved: list[Move] = []
    move = engine._runner.move
    monkeypatch.setattr(engine._runner, "move", lambda moves: [moved.extend(moves), move(moves)])
    requests = [make_request(prompt, id=str(n)) for n, prompt in enumerate(prompts)]
    together = [ids for ids, _ in run_at_once(engine, *requests)]
    again = [run(engine, request)[0][0] for request in requests[3:]]  # the last has the prefix of the other
    stats = engine.stats()
    engine.close()
    assert together == expected
    assert again == expected[3:]
    assert moved
    assert stats.preemptions > 0
    assert (stats.cached_tokens > 0) == (windows == (None,)), "small windows have passed the prefix"
    assert stats.kv_cache_share == 0


@pytest.fixture(scope="module")
def longrope() -> Any:
    return longrope_model()


def test_each_sequence_of_a_longrope_model_has_its_own_factors(longrope: Any) -> None:
    prompts = some_prompts(5, 65, 48, 300, 20)  # of 16 new tokens the last is never run: 48 stays short
    expected = [generate(longrope, prompt) for prompt in prompts]
    engine = BatchingEngine(
        copy.deepcopy(longrope), EngineLimits(max_sequences=5, context_tokens=400, max_waiting=8)
    )
    requests = [make_request(prompt, id=str(n)) for n, prompt in enumerate(prompts)]
    alone = [run(engine, request)[0][0] for request in requests]
    together = [ids for ids, _ in run(engine, *requests)]
    engine.close()
    assert alone == expected
    assert together == expected


def test_an_answer_that_may_become_long_has_the_long_factors_from_its_first_token(longrope: Any) -> None:
    (prompt,) = some_prompts(60)
    engine = BatchingEngine(
        copy.deepcopy(longrope), EngineLimits(max_sequences=2, context_tokens=400, max_waiting=8)
    )
    short, long, again = (
        run(engine, make_request(prompt, max_new_tokens=count, id=str(count)))[0][0] for count in (5, 40, 5)
    )
    engine.close()
    forced = copy.deepcopy(longrope)
    forced.config.rope_parameters["short_factor"] = forced.config.rope_parameters["long_factor"]
    forced.model.rotary_emb = type(forced.model.rotary_emb)(forced.config)
    assert short == again == generate(longrope, prompt, max_new_tokens=5)
    assert long == generate(forced, prompt, max_new_tokens=40)
    assert long[:5] != short, "the factors change nothing: proves nothing"


@pytest.fixture
def engine(tiny_llama_dir: Path) -> Iterator[BatchingEngine]:
    made = BatchingEngine(
        load(tiny_llama_dir), EngineLimits(max_sequences=32, context_tokens=600, max_waiting=8)
    )
    yield made
    made.close()


def test_fault_53_an_answer_is_the_same_alone_and_among_31_others(engine: BatchingEngine) -> None:
    prompts = some_prompts(*range(5, 37), vocabulary=512)
    greedy = make_request(prompts[3], max_new_tokens=40)
    drawn = make_request(prompts[4], max_new_tokens=40, temperature=1.2, top_p=0.9, seed=5)
    others = [
        make_request(prompt, id=str(n), max_new_tokens=20 + n, temperature=1.0 * (n % 2), seed=n)
        for n, prompt in enumerate(prompts[:30])
    ]
    alone = [*run(engine, greedy), *run(engine, drawn)]
    together = run(engine, greedy, drawn, *others)
    assert together[:2] == alone
    assert len(set(map(str, together))) > 20


def test_sequences_with_different_adapters_in_one_step_answer_as_plain_peft_does(
    engine: BatchingEngine, tiny_llama_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    for name, folder in adapter_dirs.items():
        engine.add_adapter(name, folder)
    prompts = some_prompts(5, 30, 8, 3, 60, 12, vocabulary=512)
    expected: dict[str | None, list[list[int]]] = {None: [generate(load(tiny_llama_dir), p) for p in prompts]}
    for name, folder in adapter_dirs.items():
        model = PeftModel.from_pretrained(load(tiny_llama_dir), str(folder))
        expected[name] = [generate(model, prompt) for prompt in prompts]
    cases = [(name, n) for n in range(len(prompts)) for name in (*adapter_dirs, None)]
    answers = run(engine, *(make_request(prompts[n], adapter=name, id=f"{name} {n}") for name, n in cases))
    assert [ids for ids, _ in answers] == [expected[name][n] for name, n in cases]


def test_many_adapters_come_and_go_and_each_answers_as_alone(
    engine: BatchingEngine, adapter_dirs: dict[str, Path]
) -> None:
    folder = adapter_dirs["second"]
    strengths = {f"s{n}": n / 8 for n in range(8)}
    for name, strength in strengths.items():
        engine.add_adapter(name, folder, strength=strength)
    engine.remove_adapter("s2")
    engine.add_adapter("first", adapter_dirs["my.first-one"])  # takes the free slot, with other targets
    engine.remove_adapter("s5")
    names = [name for name in (*strengths, "first") if name not in ("s2", "s5")]
    alone = [run(engine, make_request(adapter=name))[0] for name in names]
    assert run(engine, *(make_request(adapter=name, id=name) for name in names)) == alone
    assert len(set(map(str, alone))) > 4


def test_a_cached_prefix_is_not_used_across_adapters(
    engine: BatchingEngine, adapter_dirs: dict[str, Path]
) -> None:
    prompt = some_prompts(50, vocabulary=512)[0]
    base = run(engine, make_request(prompt))
    engine.add_adapter("x", adapter_dirs["second"])
    first = run(engine, make_request(prompt, adapter="x"))
    engine.remove_adapter("x")
    engine.add_adapter("x", adapter_dirs["second"], strength=0.5)
    second = run(engine, make_request(prompt, adapter="x"))
    assert len({str(base), str(first), str(second)}) == 3
    assert run(engine, make_request(prompt)) == base


def test_a_cached_prefix_is_reused_and_the_answer_is_the_same(
    engine: BatchingEngine, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, *users = some_prompts(200, 9, 14, 6, vocabulary=512)
    ran: list[int] = []
    original = engine._runner.run

    def counted(plan: Any) -> Any:
        ran.append(sum(chunk.count for chunk in plan.chunks))
        return original(plan)

    monkeypatch.setattr(engine._runner, "run", counted)
    model = load(tiny_llama_dir)
    run(engine, make_request(system + users[0]))
    assert sum(ran) == 209
    ran.clear()
    answers = run(engine, *(make_request(system + user, id=str(n)) for n, user in enumerate(users)))
    assert [ids for ids, _ in answers] == [generate(model, system + user) for user in users]
    assert sum(ran) <= 1 + 14 + 6 + 2, "only what differs is run, and the last token"


def test_a_running_sequence_shares_its_prefix_too(engine: BatchingEngine, tiny_llama_dir: Path) -> None:
    prompt = some_prompts(64, vocabulary=512)[0]
    model = load(tiny_llama_dir)
    answers = run(engine, *(make_request(prompt, id=str(n)) for n in range(6)))
    assert [ids for ids, _ in answers] == [generate(model, prompt)] * 6


def test_fault_40_a_cancelled_sequence_ends_by_the_next_step(
    engine: BatchingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    original = engine._runner.run

    def counted(plan: Any) -> Any:
        steps.append(len(plan.decode))
        return original(plan)

    monkeypatch.setattr(engine._runner, "run", counted)

    async def leave_one_of_two() -> tuple[list[int], str | None]:
        stays, leaves = (
            engine.submit(make_request(max_new_tokens=300, id="a")),
            engine.submit(make_request(max_new_tokens=300)),
        )
        for _ in range(5):
            await anext(leaves)
        await leaves.aclose()  # type: ignore[attr-defined]
        seen = len(steps)
        rest = await collect(stays)
        assert 2 not in steps[seen + 2 :]
        return rest

    assert len(asyncio.run(leave_one_of_two())[0]) == 300
    assert steps.count(1) > 100, "the other sequence went on alone"


def test_others_get_tokens_while_a_long_prompt_runs(
    engine: BatchingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[tuple[int, int]] = []
    original = engine._runner.run

    def counted(plan: Any) -> Any:
        plans.append((len(plan.decode), sum(chunk.count for chunk in plan.chunks)))
        return original(plan)

    monkeypatch.setattr(engine._runner, "run", counted)

    async def long_beside_short() -> None:
        short = engine.submit(make_request(max_new_tokens=500, id="short"))
        await anext(short)
        await collect(
            engine.submit(make_request(some_prompts(590, vocabulary=512)[0], max_new_tokens=2, id="long"))
        )
        await short.aclose()  # type: ignore[attr-defined]

    asyncio.run(long_beside_short())
    prefill = [(decoding, tokens) for decoding, tokens in plans[1:] if tokens]
    assert len(prefill) == 3
    assert all(decoding == 1 and tokens <= CHUNK_TOKENS for decoding, tokens in prefill)


def test_a_prompt_of_several_steps_runs_when_no_other_sequence_does(
    engine: BatchingEngine, tiny_llama_dir: Path
) -> None:
    """The first of its steps chooses no token at all."""
    prompt = some_prompts(590, vocabulary=512)[0]
    assert len(prompt) > PREFILL_ONLY_TOKENS
    assert run(engine, make_request(prompt, max_new_tokens=4))[0][0] == generate(
        load(tiny_llama_dir), prompt, max_new_tokens=4
    )


def test_a_prompt_longer_than_the_context_is_refused_before_the_queue(engine: BatchingEngine) -> None:
    with pytest.raises(RequestError, match="has 600 tokens, expected 1 to 599"):
        run(engine, make_request(tuple([5] * 600)))


def test_what_can_never_fit_is_refused_with_both_numbers(tiny_llama_dir: Path) -> None:
    limits = EngineLimits(max_sequences=2, context_tokens=200, max_waiting=8, positions=(100,))
    engine = BatchingEngine(load(tiny_llama_dir), limits)
    with pytest.raises(RequestError, match=r"has 80 tokens and the answer may have 40, .* memory for 100"):
        engine.submit(make_request(tuple(range(3, 83)), max_new_tokens=40))
    assert len(run(engine, make_request(tuple(range(3, 83)), max_new_tokens=20))[0][0]) == 20
    engine.close()


def test_requests_that_wait_for_room_and_those_put_off_count_as_waiting(tiny_llama_dir: Path) -> None:
    limits = EngineLimits(max_sequences=8, context_tokens=200, max_waiting=8, positions=(200,))
    engine = BatchingEngine(load(tiny_llama_dir), limits)
    seen = []
    monitored = engine._runner.run
    engine._runner.run = lambda plan: [seen.append(engine.stats()), monitored(plan)][1]  # type: ignore
    requests = [make_request(tuple(range(3 + n, 63 + n)), id=str(n), max_new_tokens=140) for n in range(4)]
    run_at_once(engine, *requests)
    engine.close()
    assert all(stats.running + stats.waiting <= 4 and stats.running for stats in seen)
    assert seen[0].running == 1
    assert seen[0].waiting == 3
    assert max(stats.kv_cache_share for stats in seen) <= 1


def test_a_sequence_with_nan_ends_alone_and_its_slot_is_cleared(
    engine: BatchingEngine, adapter_dirs: dict[str, Path]
) -> None:
    good = run(engine, make_request())
    engine.add_adapter("broken", adapter_dirs["second"])
    for layer in engine._runner.adapters._layers:  # what is NaN in its files is refused
        if layer.stacks is not None:
            layer.stacks.rows[1] = torch.nan

    async def both() -> list[Any]:
        requests = [make_request(adapter="broken"), make_request(id="2")]
        return await asyncio.gather(
            *(collect(engine.submit(each)) for each in requests), return_exceptions=True
        )

    failed, answered = asyncio.run(both())
    assert isinstance(failed, UnavailableError)
    assert answered == good[0]
    assert run(engine, *(make_request(id=str(n)) for n in range(32))) == good * 32


@pytest.mark.parametrize("passes", [1, 2], ids=["continued", "copied"])
def test_a_token_that_makes_nan_costs_no_other_request_with_the_same_beginning(
    passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It spoils the tokens before it in its chunk, which stay as prefix cache where it is cancelled."""
    model = model_of("llama")
    beginning, (rest,) = tuple(range(30, 50)), some_prompts(60)
    good = (*beginning, 60, 61)
    expected = generate(model, good)
    with torch.no_grad():
        model.get_input_embeddings().weight[WRONG_TOKEN] = torch.nan
    monkeypatch.setattr("runtime.serving.engine.engine.PREFILL_ONLY_TOKENS", 32)
    engine = BatchingEngine(model, EngineLimits(max_sequences=4, context_tokens=200, max_waiting=8))
    run_plan, plans = engine._runner.run, []

    def cancelled(plan: StepPlan) -> torch.Tensor:
        plans.append(plan)
        if len(plans) == passes:
            engine.cancel("1")
        return run_plan(plan)

    engine._runner.run = cancelled  # type: ignore[method-assign]
    spoilt = run(engine, make_request((*beginning, WRONG_TOKEN, *rest)))
    again = [run(engine, make_request(good, id=id_))[0][0] for id_ in "23"]
    stats = engine.stats()
    engine.close()
    assert spoilt == [([], "cancelled")]
    assert again == [expected, expected]
    assert (stats.prompt_tokens, stats.cached_tokens) == (2 * len(good), len(good) - 1)


def test_the_first_token_carries_the_waiting_time_and_the_cached_tokens(engine: BatchingEngine) -> None:
    async def begin() -> list[Start | None]:
        return [token.start async for token in engine.submit(make_request(prompt))]

    prompt = some_prompts(50, vocabulary=512)[0]
    first, again = asyncio.run(begin()), asyncio.run(begin())
    assert first[0] is not None
    assert again[0] is not None
    assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 49)
    assert 0 <= first[0].queued_s < 5
    assert set(first[1:]) == {None}
    assert (engine.stats().prompt_tokens, engine.stats().cached_tokens) == (100, 49)


def test_fault_48_an_engine_whose_steps_all_fail_stops(
    engine: BatchingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._runner, "run", broken)
    for _ in range(3):
        with pytest.raises(UnavailableError):
            run(engine, make_request())
    engine._thread.join(60)
    assert not engine.stats().alive
    with pytest.raises(UnavailableError, match="has stopped"):
        run(engine, make_request())


def test_an_adapter_name_in_use_is_refused_and_the_first_adapter_stays(
    engine: BatchingEngine, adapter_dirs: dict[str, Path]
) -> None:
    engine.add_adapter("x", adapter_dirs["second"])
    before = run(engine, make_request(adapter="x"))
    with pytest.raises(ConfigError, match="adapter x: is already loaded"):
        engine.add_adapter("x", adapter_dirs["my.first-one"])
    assert run(engine, make_request(adapter="x")) == before


def test_requests_are_answered_while_an_adapter_is_read(
    engine: BatchingEngine, adapter_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, answered = threading.Event(), threading.Event()
    scaled_pairs = lora.scaled_pairs

    def slow(*args: Any, **options: Any) -> Any:
        reading.set()
        assert answered.wait(60)
        return scaled_pairs(*args, **options)

    monkeypatch.setattr(lora, "scaled_pairs", slow)
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(engine.add_adapter, "x", adapter_dirs["second"])
        assert reading.wait(60)
        before = run(engine, make_request())
        answered.set()
        adding.result(60)
    assert run(engine, make_request(adapter="x")) != before


def test_a_model_that_cannot_be_prepared_leaves_no_thread(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no memory for the cache")

    monkeypatch.setattr("runtime.serving.engine.engine.ModelRunner", broken)
    of_others = frozenset(threading.enumerate())  # engines that other tests share live through this one
    with pytest.raises(RuntimeError, match="no memory for the cache"):
        BatchingEngine(load(tiny_llama_dir), EngineLimits(max_sequences=1, context_tokens=32, max_waiting=1))
    for thread in threading.enumerate():
        if thread.name == "engine" and thread not in of_others:
            thread.join(60)
            assert not thread.is_alive()


def test_an_adapter_for_a_layer_the_engine_cannot_adapt_is_refused_by_name(
    engine: BatchingEngine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = adapter_dirs["second"]
    config = (source / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace("o_proj", "extra_proj"))
    weights = load_file(str(source / "adapter_model.safetensors"))
    renamed = {name.replace("o_proj", "extra_proj"): value for name, value in weights.items()}
    save_file(renamed, str(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(
        ConfigError, match=r"adapter odd: .*no layer 'model\.layers\.0\.self_attn\.extra_proj'"
    ):
        engine.add_adapter("odd", tmp_path)
    assert engine.stats().adapters == ()


def test_stop_ids_and_lengths_end_sequences_at_different_times(
    engine: BatchingEngine, tiny_llama_dir: Path
) -> None:
    text = generate(load(tiny_llama_dir), max_new_tokens=30)
    stop = text[10]
    requests = [make_request(max_new_tokens=n, id=str(n)) for n in (1, 7, 30)]
    stopped = make_request(max_new_tokens=30, stop_ids=frozenset({stop}), id="stop")
    answers = run(engine, *requests, stopped)
    assert answers[:3] == [(text[:n], "length") for n in (1, 7, 30)]
    assert answers[3] == (text[: text.index(stop)], "stop")
    assert engine.stats().running == 0
    assert engine.stats().kv_cache_share == 0


@pytest.mark.parametrize("kernels", [False, True])
def test_many_adapters_in_one_step_answer_as_each_alone(
    tiny_llama_dir: Path, adapter_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    if not kernels:
        monkeypatch.setattr(Kernels, "find", lambda: None)
    limits = EngineLimits(max_sequences=16, context_tokens=200, max_waiting=16)
    engine = BatchingEngine(load(tiny_llama_dir), limits)
    names = [f"n{number}" for number in range(6)]
    for number, name in enumerate(names):
        folder = adapter_dirs["second" if number % 2 else "my.first-one"]
        engine.add_adapter(name, folder, strength=1 - number / 10)
    alone = [run(engine, make_request(adapter=name))[0] for name in names]
    requests = [
        make_request(adapter=name, id=f"{name} {turn}") for turn in range(2) for name in (*names, None)
    ]
    base = run(engine, make_request())
    assert run(engine, *requests) == [*alone, *base] * 2
    assert len(set(map(str, [*alone, *base]))) == 7
    engine.close()
