"""Answers that are guessed ahead: whatever the guesses are, the text is that of one token a step."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.serving.engine import scheduler
from runtime.serving.engine.engine import BatchingEngine
from runtime.serving.engine.protocol import Request, Token
from tests.serving.engine.asking import PROMPT, Oracle, ask, generate, load, run
from tests.serving.engine.test_engine import FAMILIES, model_of, some_prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_right_and_wrong_guesses_leave_the_text_and_the_cache_as_they_would_be(
    family: str, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "GUESSING_ROWS", 2)
    model = model_of(family)
    prompts = some_prompts(3, 40)
    wholes = [(*prompt, *generate(model, prompt, max_new_tokens=40)) for prompt in prompts]
    engine = BatchingEngine(model, rows=2, context_tokens=400, queue=8, guess_tokens=8)
    oracle.known = wholes
    asked = [ask(prompt, max_new_tokens=25, id=str(number)) for number, prompt in enumerate(prompts)]
    alone = [run(engine, request)[0][0] for request in asked]
    together = [ids for ids, _ in run(engine, *asked)]
    longer = [whole[: len(prompt) + 25] for prompt, whole in zip(prompts, wholes, strict=True)]
    later = [run(engine, ask(prompt, max_new_tokens=15))[0][0] for prompt in longer]
    figures = engine.stats()
    engine.close()
    assert alone == together == [list(a[len(p) :]) for a, p in zip(longer, prompts, strict=True)]
    assert later == [list(whole[-15:]) for whole in wholes], "wrong guesses were left in the cache"
    assert figures.guessed_tokens > figures.right_tokens > 60
    assert figures.cached_tokens > 60


def test_a_wrong_guess_that_becomes_nan_is_not_left_where_others_look(oracle: Oracle) -> None:
    model = model_of("llama")
    prompts = some_prompts(3, 40)
    wholes = [(*prompt, *generate(model, prompt, max_new_tokens=30)) for prompt in prompts]
    unused = next(token for token in range(3, 128) if not any(token in whole for whole in wholes))
    oracle.wrong = unused
    with torch.no_grad():
        model.get_input_embeddings().weight[unused] = torch.nan
    engine = BatchingEngine(model, rows=2, context_tokens=400, queue=8, guess_tokens=8)
    oracle.known = wholes
    asked = [ask(prompt, max_new_tokens=30, id=str(number)) for number, prompt in enumerate(prompts)]
    alone = [run(engine, request)[0][0] for request in asked]
    together = [ids for ids, _ in run(engine, *asked)]
    guessed = engine.stats().guessed_tokens
    engine.close()
    assert alone == together == [list(whole[-30:]) for whole in wholes]
    assert guessed > 0


@pytest.fixture
def engine(tiny_llama_dir: Path, oracle: Oracle) -> Iterator[BatchingEngine]:
    made = BatchingEngine(load(tiny_llama_dir), rows=2, context_tokens=100, queue=8, guess_tokens=8)
    oracle.known = [(*PROMPT, *generate(load(tiny_llama_dir), max_new_tokens=95))]
    yield made
    made.close()


def test_an_answer_ends_where_it_would_without_guesses(engine: BatchingEngine, tiny_llama_dir: Path) -> None:
    whole = generate(load(tiny_llama_dir), max_new_tokens=95)
    for count in (1, 2, 8, 9, 30):
        assert run(engine, ask(max_new_tokens=count)) == [(whole[:count], "length")]
    assert run(engine, ask(max_new_tokens=500)) == [(whole[:95], "length")], "the context's end"
    for place in range(2, 12):
        stop = frozenset({whole[place]})
        expected = (whole[: whole.index(whole[place])], "stop")
        assert run(engine, ask(max_new_tokens=30, stop_ids=stop)) == [expected]


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"top_logprobs": 2},
        {"logit_bias": {5: 3.0}},
    ],
    ids=lambda sampling: next(iter(sampling)),
)
def test_penalties_and_logprobs_count_the_tokens_that_were_guessed(
    tiny_llama_dir: Path, oracle: Oracle, sampling: dict[str, Any]
) -> None:
    request = ask(max_new_tokens=40, **sampling)
    plain = BatchingEngine(load(tiny_llama_dir), rows=1, context_tokens=100, queue=8)
    expected = tokens(plain, request)
    plain.close()
    oracle.known = [(*PROMPT, *(token.id for token in expected if token.id is not None))]
    guessing = BatchingEngine(load(tiny_llama_dir), rows=1, context_tokens=100, queue=8, guess_tokens=8)
    found = tokens(guessing, request)
    right = guessing.stats().right_tokens
    guessing.close()
    assert [token.id for token in found] == [token.id for token in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [pair[0] for pair in one.top] == [pair[0] for pair in other.top]
    assert right > 20


def tokens(engine: BatchingEngine, request: Request) -> list[Token]:
    async def all_of_them() -> list[Token]:
        return [token async for token in engine.submit(request)]

    return asyncio.run(all_of_them())


def test_guesses_make_fewer_steps(engine: BatchingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    run_step = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda plan: steps.append(plan) or run_step(plan))
    run(engine, ask(max_new_tokens=60))
    assert 60 / 6 <= len(steps) <= 60 / 3


def test_an_answer_by_seed_is_not_guessed(engine: BatchingEngine) -> None:
    run(engine, ask(max_new_tokens=40, temperature=0.8, seed=3))
    assert engine.stats().guessed_tokens == 0
    run(engine, ask(max_new_tokens=40, temperature=0.8))
    assert engine.stats().guessed_tokens > 0


def test_a_row_that_decodes_beside_another_is_not_guessed(engine: BatchingEngine) -> None:
    run(engine, ask(max_new_tokens=40, id="1"), ask(max_new_tokens=40, id="2"))
    assert engine.stats().guessed_tokens < 40, "but while the other's prompt or answer was not there"


def test_a_repetitive_answer_is_guessed_from_itself(tiny_llama_dir: Path) -> None:
    prompt = (*range(20, 50), *range(20, 40))
    model = load(tiny_llama_dir)
    engine = BatchingEngine(load(tiny_llama_dir), rows=1, context_tokens=400, queue=8, guess_tokens=8)
    answer = run(engine, ask(prompt, max_new_tokens=200))[0][0]
    right = engine.stats().right_tokens
    engine.close()
    assert answer == generate(model, prompt, max_new_tokens=200)
    assert right > 0, "a random model falls into loops"
