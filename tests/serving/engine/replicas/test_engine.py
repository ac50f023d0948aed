"""Two replicas of a tiny model, real processes: one engine's answers, shared work, and no process left."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import oci
from runtime.errors import ConfigError, OverloadedError, RequestError, UnavailableError, UnknownModelError
from runtime.serving import loading
from runtime.serving.engine.engine import BatchingEngine, EngineLimits
from runtime.serving.engine.protocol import Constraint, Engine, Grammar, Mask, Request, Sampling
from runtime.serving.engine.replicas.engine import ReplicaEngine
from runtime.serving.engine.replicas.messages import LoadAdapter, UnloadAdapter
from runtime.serving.lifecycle import ServedModel
from runtime.serving.settings import ServeConfig
from tests.serving.conftest import until
from tests.serving.engine.calls import assert_scored, collect, load, make_request, run, score, scoring
from tests.serving.engine.models import some_prompts

pytestmark = pytest.mark.slow

ROWS, QUEUE = 12, 2
PROMPTS = some_prompts(*range(3, 203, 10), vocabulary=500)
LONG = {"max_new_tokens": 1500}


def config_of(folder: Path, **more: Any) -> ServeConfig:
    model = {"name": "tiny", "path": str(folder)} | more.pop("model", {})
    limits = {"rows": ROWS, "queue": QUEUE}
    return ServeConfig.model_validate(
        {"model": model, "served_name": "tiny", "replicas": 2, "limits": limits} | more
    )


@contextmanager
def loaded(config: ServeConfig) -> Iterator[ServedModel]:
    served = loading.load(config, oci.Access())
    try:
        yield served
    finally:
        served.engine.close()
        served.tokenizer.close()


@pytest.fixture(scope="module")
def served(tiny_llama_dir: Path) -> Iterator[ServedModel]:
    with loaded(config_of(tiny_llama_dir)) as made:
        yield made


@pytest.fixture
def two(served: ServedModel) -> ReplicaEngine:
    assert isinstance(served.engine, ReplicaEngine)
    return served.engine


@pytest.fixture(scope="module")
def one(tiny_llama_dir: Path, adapter_dirs: dict[str, Path]) -> Iterator[Engine]:
    engine = BatchingEngine(
        load(tiny_llama_dir), EngineLimits(max_sequences=20, context_tokens=2048, max_waiting=20)
    )
    engine.add_adapter("second", adapter_dirs["second"])
    yield engine
    engine.close()


def dispatched(engine: ReplicaEngine) -> list[int]:
    return [load.dispatched for load in engine._dispatcher._replicas]


def processes(engine: ReplicaEngine) -> list[psutil.Process]:
    return [psutil.Process(replica.process._process.pid) for replica in engine._replicas]


def idle(engine: ReplicaEngine) -> bool:
    return not any(replica.stats.running for replica in engine._replicas) and not engine.stats().running


def test_answers_are_those_of_one_engine_and_both_replicas_give_some(two: ReplicaEngine, one: Engine) -> None:
    requests = [make_request(prompt, id=str(n)) for n, prompt in enumerate(PROMPTS)]
    before = two.stats().prompt_tokens, dispatched(two)
    expected = run(one, *requests)
    assert run(two, *requests) == expected
    assert len({token for ids, _ in expected for token in ids}) > 8, (
        "the model repeats itself: proves nothing"
    )
    gained = [after - earlier for earlier, after in zip(before[1], dispatched(two), strict=True)]
    assert sum(gained) == len(PROMPTS)
    assert min(gained) >= 8
    until(lambda: two.stats().prompt_tokens - before[0] == sum(map(len, PROMPTS)))
    assert all(replica.stats.prompt_tokens > 300 for replica in two._replicas)


def test_figures_are_sums(two: ReplicaEngine) -> None:
    stats = two.stats()
    assert (stats.replicas, stats.max_sequences, two.max_sequences) == (2, 2 * ROWS, 2 * ROWS)
    assert stats.cache_tokens == 2 * ROWS * two.context_tokens
    assert stats.alive


def test_a_seed_and_log_probabilities_cross_the_border(two: ReplicaEngine, one: Engine) -> None:
    request = make_request(PROMPTS[4], temperature=1.0, seed=5, top_logprobs=2, logit_bias={7: 1.5})

    async def tokens(engine: Engine) -> list[Any]:
        return [token async for token in engine.submit(request)]

    ours, theirs = asyncio.run(tokens(two)), asyncio.run(tokens(one))
    assert [token.id for token in ours] == [token.id for token in theirs]
    assert [round(token.logprob, 3) for token in ours[:-1]] == [round(t.logprob, 3) for t in theirs[:-1]]
    assert [id_ for id_, _ in ours[0].top] == [id_ for id_, _ in theirs[0].top]
    assert ours[0].start is not None
    assert all(token.start is None for token in ours[1:])


def test_log_probabilities_of_a_prompt_cross_the_border(two: ReplicaEngine, tiny_llama_dir: Path) -> None:
    requests = [scoring(prompt, id=str(n), max_new_tokens=n) for n, prompt in enumerate(PROMPTS[:3])]
    for request, tokens in zip(requests, score(two, *requests), strict=True):
        assert_scored(tokens, request.prompt_ids, load(tiny_llama_dir))


def test_bans_cross_the_border(two: ReplicaEngine, one: Engine) -> None:
    plain = run(one, make_request(PROMPTS[4]))[0][0]
    bans = {"no_repeat_ngram_size": 2, "bad_words_ids": [plain[:2]], "begin_suppress_tokens": [plain[0]]}
    request = make_request(PROMPTS[4], **bans)
    assert run(two, request) == run(one, request)
    assert run(two, request)[0][0] != plain


def test_equal_beginnings_are_answered_by_the_replica_that_has_them(two: ReplicaEngine) -> None:
    (beginning,) = some_prompts(256, vocabulary=499)
    before = dispatched(two)

    async def cached(tail: int) -> int:
        tokens = [token async for token in two.submit(make_request((*beginning, tail)))]
        assert tokens[0].start is not None
        return tokens[0].start.cached_tokens

    assert [asyncio.run(cached(tail)) >= 256 for tail in range(4)] == [False, True, True, True]
    gained = [after - earlier for earlier, after in zip(before, dispatched(two), strict=True)]
    assert sorted(gained) == [0, 4]
    until(lambda: two.stats().cached_tokens >= 3 * 256)


def test_a_request_that_is_cancelled_or_left_frees_its_place(two: ReplicaEngine) -> None:
    async def leave_and_cancel() -> tuple[list[int], str | None]:
        left = two.submit(make_request(id="left", **LONG))
        await anext(left)
        await left.aclose()  # type: ignore[attr-defined]  # an async generator
        cancelled = two.submit(make_request(id="cancelled", **LONG))
        await anext(cancelled)
        two.cancel("cancelled")
        return await collect(cancelled)

    ids, end = asyncio.run(leave_and_cancel())
    assert end == "cancelled"
    assert len(ids) < LONG["max_new_tokens"]
    until(lambda: idle(two))


def test_one_request_too_many_is_refused_at_once(two: ReplicaEngine) -> None:
    async def overload() -> None:
        taken = [two.submit(make_request(id=str(n), **LONG)) for n in range(2 * (ROWS + QUEUE))]
        with pytest.raises(OverloadedError, match="4 requests are waiting already"):
            two.submit(make_request(id="one too many"))
        for number in range(len(taken)):
            two.cancel(str(number))
        ends = await asyncio.gather(*map(collect, taken))
        assert {end for _, end in ends} == {"cancelled"}

    asyncio.run(overload())
    until(lambda: idle(two))


def test_adapters_are_on_every_replica(
    two: ReplicaEngine, one: Engine, adapter_dirs: dict[str, Path]
) -> None:
    requests = [
        make_request(prompt, id=str(n), adapter="second" if n % 2 else None)
        for n, prompt in enumerate(PROMPTS)
    ]
    two.add_adapter("second", adapter_dirs["second"])
    with pytest.raises(ConfigError, match="already loaded"):
        two.add_adapter("second", adapter_dirs["second"])
    assert two.stats().adapters == ("second",)
    assert run(two, *requests) == run(one, *requests)
    two.remove_adapter("second")
    assert two.stats().adapters == ()
    with pytest.raises(UnknownModelError, match="'second' is not loaded"):
        run(two, make_request(adapter="second"))
    with pytest.raises(UnknownModelError, match="'second' is not loaded"):
        two.remove_adapter("second")
    until(lambda: all(replica.stats.adapters == () for replica in two._replicas))


def test_an_adapter_that_one_replica_refuses_is_on_none(
    two: ReplicaEngine, adapter_dirs: dict[str, Path]
) -> None:
    two._replicas[0].ask(LoadAdapter("second", adapter_dirs["second"], 1.0)).result(30)
    with pytest.raises(ConfigError, match="already loaded"):
        two.add_adapter("second", adapter_dirs["second"])
    until(lambda: two._replicas[1].stats.adapters == ())
    assert two.stats().adapters == ()
    two._replicas[0].ask(UnloadAdapter("second")).result(30)


def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(
    two: ReplicaEngine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(adapter_dirs["second"], folder)
    file = str(folder / "adapter_model.safetensors")
    weights = load_file(file)
    save_file(
        {
            name: torch.cat((value, value), -1) if "lora_A" in name else value
            for name, value in weights.items()
        },
        file,
    )
    with pytest.raises(ConfigError, match="adapter bad: does not fit this model"):
        two.add_adapter("bad", folder)
    assert two.stats().adapters == ()


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "(ab|cd){3}", "guided_regex"),
        Constraint("schema", {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
                              "additionalProperties": False}, "response_format"),
    ],
)  # fmt: skip
def test_constraints_hold_in_a_replica(served: ServedModel, constraint: Constraint) -> None:
    async def answer() -> str:
        sampling = await served.tokenizer.constrained(Sampling(max_new_tokens=60), constraint)
        ids, end = await collect(served.engine.submit(Request(PROMPTS[3], sampling, id="constrained")))
        assert end == "stop"
        return served.tokenizer.decode(ids)

    text = asyncio.run(answer())
    if constraint.kind == "regex":
        assert len(text) == 6
        assert set(text) <= set("abcd")
    else:
        assert json.loads(text)["n"] in {1, 2}


def test_a_failure_of_a_replica_is_the_requests_own(two: ReplicaEngine) -> None:
    def never() -> Mask:
        raise AssertionError("it is compiled in the replica")

    bad = Grammar(Constraint("regex", "(", "guided_regex"), never)
    with pytest.raises(RequestError, match="'guided_regex'") as caught:
        run(two, make_request(grammar=bad))
    assert caught.value.param == "guided_regex"
    assert run(two, make_request())[0][1] == "length"


def test_a_replica_that_hangs_shows_as_no_progress(two: ReplicaEngine) -> None:
    process = processes(two)[0]

    async def hang() -> None:
        answers = [two.submit(make_request(id=str(n), **LONG)) for n in range(2)]
        await asyncio.gather(*map(anext, answers))
        process.suspend()
        try:
            async with asyncio.timeout(60):  # though the other one goes on
                while two.stats().last_progress_s > time.monotonic() - 0.8:
                    await asyncio.sleep(0.01)
        finally:
            process.resume()
            for number in range(2):
                two.cancel(str(number))
        await asyncio.gather(*map(collect, answers))

    asyncio.run(hang())
    until(lambda: idle(two))
    until(lambda: two.stats().last_progress_s > time.monotonic() - 1)


def test_closing_ends_the_processes_and_answers_in_flight(tiny_llama_dir: Path) -> None:
    served = loading.load(config_of(tiny_llama_dir), oci.Access())
    engine = served.engine
    assert isinstance(engine, ReplicaEngine)
    both = processes(engine)

    async def close() -> list[tuple[list[int], str | None]]:
        answers = [engine.submit(make_request(id=str(n), **LONG)) for n in range(4)]
        await asyncio.gather(*map(anext, answers))
        await asyncio.to_thread(engine.close)
        return await asyncio.gather(*map(collect, answers))

    assert {end for _, end in asyncio.run(close())} == {"cancelled"}
    assert not any(process.is_running() for process in both)
    with pytest.raises(UnavailableError, match="has died"):
        engine.add_adapter("late", tiny_llama_dir)
    assert [replica.process._process.returncode for replica in engine._replicas] == [0, 0]
    served.tokenizer.close()


def test_what_a_replica_cannot_load_is_the_servers_failure(tiny_llama_dir: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(ConfigError, match=r"model tiny in .*nonsense"):
        loading.load(config_of(tiny_llama_dir, model={"attention": "nonsense"}), oci.Access())
    assert psutil.Process().children() == before
