"""Prompt lookup: what it drafts, and that the text is that of one token per step whatever it drafts."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.serving.engine import scheduler
from runtime.serving.engine.engine import BatchingEngine, EngineLimits
from runtime.serving.engine.prompt_lookup import (
    FIRST_DRAFT_TOKENS,
    MAX_PAUSE_TOKENS,
    NGRAM_SIZES,
    PromptLookup,
)
from runtime.serving.engine.protocol import Constraint, Grammar, Request, Token
from tests.families import SERVED, model_of
from tests.serving.engine.calls import PROMPT, Oracle, generate, load, make_request, run
from tests.serving.engine.models import some_prompts

A, B, C, D = 11, 12, 13, 14


def test_the_draft_is_what_followed_the_latest_occurrence_of_the_newest_tokens() -> None:
    ids = [A, B, C, 20, 21, A, B, C, 30, 31, 32, 33, 34, 5, A, B, C]
    assert PromptLookup().draft(ids, most=16) == (30, 31, 32, 33)


def test_a_longer_match_wins_over_a_later_one() -> None:
    ids = [A, B, C, 20, 21, 22, 23, D, B, C, 30, 31, 32, 33, A, B, C]
    assert PromptLookup().draft(ids, most=16) == (20, 21, 22, 23)


def test_no_draft_where_nothing_repeats_or_none_is_wanted() -> None:
    assert PromptLookup().draft([1, 2, 3, 4, 5], most=16) == ()
    assert PromptLookup().draft([1], most=16) == ()
    assert PromptLookup().draft([1, 2, 3, 1, 2, 3], most=0) == ()


def test_a_repeated_token_is_drafted_as_far_as_it_is_known() -> None:
    assert PromptLookup().draft([7] * 10, most=16) == (7,), "only one token is known to have followed"


def test_equal_bytes_that_straddle_two_tokens_are_no_match() -> None:
    # in memory 00 00 01 00 00 00 01 00 00 05 ..: from the second byte on it reads 0x100, 0x100
    ids = [0x10000, 0x10000, 0x500, 0x100, 0x100]
    assert PromptLookup().draft(ids, most=4) == ()


def test_a_fully_accepted_draft_doubles_the_next() -> None:
    ids = [*range(100, 164), 1, 2, 100, 101, 102]
    lookup = PromptLookup()
    first = lookup.draft(ids, most=16)
    lookup.record(drafted=len(first), accepted=len(first), length=len(ids))
    assert (len(first), len(lookup.draft(ids, most=16)), len(lookup.draft(ids, most=6))) == (4, 8, 6)


def test_rejected_drafts_are_followed_by_longer_and_longer_pauses() -> None:
    lookup, ids, pauses = PromptLookup(), [A, B, C, D] * 2, []
    for _ in range(8):
        begun = len(ids)
        while not lookup.draft(ids, most=4):
            ids.append([A, B, C, D][len(ids) % 4])
        pauses.append(len(ids) - begun)
        lookup.record(drafted=4, accepted=0, length=len(ids))
    assert pauses == [0, 2, 4, 8, 16, 32, MAX_PAUSE_TOKENS, MAX_PAUSE_TOKENS]
    lookup.record(drafted=4, accepted=1, length=len(ids))
    assert lookup.draft(ids, most=4), "one accepted token ends the pause"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.randoms())
def test_a_growing_sequence_gets_the_same_drafts_as_a_complete_one(
    ids: list[int], draw: random.Random
) -> None:
    growing = PromptLookup()
    for length in sorted(draw.sample(range(1, len(ids) + 1), min(5, len(ids)))):
        begin = ids[:length]
        drafted = growing.draft(begin, most=16)
        expected = PromptLookup().draft(begin, most=16)
        assert drafted == expected
        assert len(drafted) <= FIRST_DRAFT_TOKENS
        if drafted:
            positions = [p for p in range(length) if tuple(begin[p : p + len(drafted)]) == drafted]
            shortest = NGRAM_SIZES[-1]
            assert any(begin[p - shortest : p] == begin[-shortest:] for p in positions)


@pytest.mark.parametrize("family", SERVED)
def test_accepted_and_rejected_drafts_leave_the_same_text_and_cache(
    family: str, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_DRAFTING_SEQUENCES", 2)
    model = model_of(family)
    prompts = some_prompts(3, 40)
    texts = [(*prompt, *generate(model, prompt, max_new_tokens=40)) for prompt in prompts]
    engine = BatchingEngine(
        model, EngineLimits(max_sequences=2, context_tokens=400, max_waiting=8, draft_tokens=8)
    )
    oracle.known = texts
    requests = [make_request(prompt, max_new_tokens=25, id=str(n)) for n, prompt in enumerate(prompts)]
    alone = [run(engine, request)[0][0] for request in requests]
    together = [ids for ids, _ in run(engine, *requests)]
    longer = [text[: len(prompt) + 25] for prompt, text in zip(prompts, texts, strict=True)]
    later = [run(engine, make_request(prompt, max_new_tokens=15))[0][0] for prompt in longer]
    figures = engine.stats()
    engine.close()
    assert alone == together == [list(a[len(p) :]) for a, p in zip(longer, prompts, strict=True)]
    assert later == [list(text[-15:]) for text in texts], "rejected tokens were left in the cache"
    assert figures.drafted_tokens > figures.accepted_tokens > 60
    assert figures.cached_tokens > 60


def test_a_rejected_token_that_gives_nan_is_cleared_from_the_cache(oracle: Oracle) -> None:
    model = model_of("llama")
    prompts = some_prompts(3, 40)
    texts = [(*prompt, *generate(model, prompt, max_new_tokens=30)) for prompt in prompts]
    unused = next(token for token in range(3, 128) if not any(token in text for text in texts))
    oracle.wrong = unused
    with torch.no_grad():
        model.get_input_embeddings().weight[unused] = torch.nan
    engine = BatchingEngine(
        model, EngineLimits(max_sequences=2, context_tokens=400, max_waiting=8, draft_tokens=8)
    )
    oracle.known = texts
    requests = [make_request(prompt, max_new_tokens=30, id=str(n)) for n, prompt in enumerate(prompts)]
    alone = [run(engine, request)[0][0] for request in requests]
    together = [ids for ids, _ in run(engine, *requests)]
    drafted = engine.stats().drafted_tokens
    engine.close()
    assert alone == together == [list(text[-30:]) for text in texts]
    assert drafted > 0


@pytest.fixture
def engine(tiny_llama_dir: Path, oracle: Oracle) -> Iterator[BatchingEngine]:
    made = BatchingEngine(
        load(tiny_llama_dir), EngineLimits(max_sequences=2, context_tokens=100, max_waiting=8, draft_tokens=8)
    )
    oracle.known = [(*PROMPT, *generate(load(tiny_llama_dir), max_new_tokens=95))]
    yield made
    made.close()


def test_an_answer_ends_where_it_would_without_drafts(engine: BatchingEngine, tiny_llama_dir: Path) -> None:
    text = generate(load(tiny_llama_dir), max_new_tokens=95)
    for count in (1, 2, 8, 9, 30):
        assert run(engine, make_request(max_new_tokens=count)) == [(text[:count], "length")]
    assert run(engine, make_request(max_new_tokens=500)) == [(text[:95], "length")], "the context's end"
    for place in range(2, 12):
        stop = frozenset({text[place]})
        expected = (text[: text.index(text[place])], "stop")
        assert run(engine, make_request(max_new_tokens=30, stop_ids=stop)) == [expected]


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
def test_penalties_and_logprobs_count_accepted_tokens(
    tiny_llama_dir: Path, oracle: Oracle, sampling: dict[str, Any]
) -> None:
    request = make_request(max_new_tokens=40, **sampling)
    plain = BatchingEngine(
        load(tiny_llama_dir), EngineLimits(max_sequences=1, context_tokens=100, max_waiting=8)
    )
    expected = tokens(plain, request)
    plain.close()
    oracle.known = [(*PROMPT, *(token.id for token in expected if token.id is not None))]
    drafting = BatchingEngine(
        load(tiny_llama_dir), EngineLimits(max_sequences=1, context_tokens=100, max_waiting=8, draft_tokens=8)
    )
    found = tokens(drafting, request)
    accepted = drafting.stats().accepted_tokens
    drafting.close()
    assert [token.id for token in found] == [token.id for token in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [pair[0] for pair in one.top] == [pair[0] for pair in other.top]
    assert accepted > 20


class OneAfterAnother:
    """A constraint on ids below 400 that is asked once before each token, as the process of one has to be."""

    def __init__(self) -> None:
        self.asked = False

    def allowed(self) -> bytes:
        assert not self.asked
        self.asked = True
        return bytes([1]) * 400

    def take(self, token: int) -> None:
        assert self.asked, "no mask was asked for before this token"
        assert token < 400
        self.asked = False


def test_a_constraint_is_asked_once_before_each_token_of_a_draft(
    tiny_llama_dir: Path, oracle: Oracle
) -> None:
    request = make_request(max_new_tokens=40, allowed_token_ids=range(400))
    limits = EngineLimits(max_sequences=1, context_tokens=100, max_waiting=8, draft_tokens=8)
    engine = BatchingEngine(load(tiny_llama_dir), limits)
    (expected,) = run(engine, request)
    oracle.known = [(*PROMPT, *expected[0])]
    accepted = engine.stats().accepted_tokens
    grammar = Grammar(Constraint("regex", "", ""), OneAfterAnother)
    assert run(engine, make_request(max_new_tokens=40, grammar=grammar)) == [expected]
    accepted = engine.stats().accepted_tokens - accepted
    engine.close()
    assert accepted > 20


def tokens(engine: BatchingEngine, request: Request) -> list[Token]:
    async def all_of_them() -> list[Token]:
        return [token async for token in engine.submit(request)]

    return asyncio.run(all_of_them())


def test_drafts_make_fewer_steps(engine: BatchingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    run_step = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda plan: steps.append(plan) or run_step(plan))
    run(engine, make_request(max_new_tokens=60))
    assert 60 / 6 <= len(steps) <= 60 / 3


def test_a_seeded_answer_has_no_drafts(engine: BatchingEngine) -> None:
    run(engine, make_request(max_new_tokens=40, temperature=0.8, seed=3))
    assert engine.stats().drafted_tokens == 0
    run(engine, make_request(max_new_tokens=40, temperature=0.8))
    assert engine.stats().drafted_tokens > 0


def test_a_sequence_that_decodes_beside_another_has_no_drafts(engine: BatchingEngine) -> None:
    run(engine, make_request(max_new_tokens=40, id="1"), make_request(max_new_tokens=40, id="2"))
    assert engine.stats().drafted_tokens < 40, "drafts only before the other begins and after it ends"


def test_a_repetitive_answer_is_drafted_from_itself(tiny_llama_dir: Path) -> None:
    prompt = (*range(20, 50), *range(20, 40))
    model = load(tiny_llama_dir)
    engine = BatchingEngine(
        load(tiny_llama_dir), EngineLimits(max_sequences=1, context_tokens=400, max_waiting=8, draft_tokens=8)
    )
    answer = run(engine, make_request(prompt, max_new_tokens=200))[0][0]
    accepted = engine.stats().accepted_tokens
    engine.close()
    assert answer == generate(model, prompt, max_new_tokens=200)
    assert accepted > 0, "a random model falls into loops"
