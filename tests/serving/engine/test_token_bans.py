"""Bans are those of transformers' generate, on every engine that serves them, and with drafts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import RequestError
from runtime.serving.engine.backends.simple import SimpleEngine
from runtime.serving.engine.engine import BatchingEngine, EngineLimits
from runtime.serving.engine.protocol import Engine, Sampling
from runtime.serving.engine.sampler import Choice, Sampler
from runtime.serving.engine.sampling import TokenChooser
from runtime.serving.engine.token_bans import BadWords, RepeatedNgrams
from tests.families import model_of
from tests.serving.engine.calls import generate, load, make_request, run
from tests.serving.engine.models import some_prompts

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0])
SMALL = st.lists(st.integers(0, 3), min_size=1, max_size=24)


@pytest.fixture(scope="module", params=["simple", "batching", "drafting"])
def engine(request: pytest.FixtureRequest, tiny_llama_dir: Path) -> Iterator[Engine]:
    model = load(tiny_llama_dir)
    if request.param == "simple":
        made: Engine = SimpleEngine(model, context_tokens=256, max_waiting=8)
    else:
        drafts = 8 if request.param == "drafting" else 0
        made = BatchingEngine(
            model, EngineLimits(max_sequences=4, context_tokens=256, max_waiting=8, draft_tokens=drafts)
        )
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain(tiny_llama_dir: Path) -> Any:
    return load(tiny_llama_dir)


def forbidden(plain: Any, prompt: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return options that each change the model's answer to `prompt`."""
    answer = generate(plain, prompt, max_new_tokens=24)
    return [
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3},
        {"no_repeat_ngram_size": 60},
        {"bad_words_ids": [[answer[0]], [answer[1], answer[2]], answer[2:6], [7] * 40]},
        {"bad_words_ids": [[prompt[-1], answer[0]]]},
        {"suppress_tokens": [answer[0], answer[3]]},
        {"begin_suppress_tokens": [answer[0]]},
        {"forced_eos_token_id": [9, 11]},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [answer[0]], "repetition_penalty": 1.2},
    ]


def test_bans_are_those_of_generate(engine: Engine, plain: Any) -> None:
    for begun in some_prompts(5, 60, vocabulary=512):
        prompt = begun + begun[:8]  # something to repeat, and to draft from
        for options in forbidden(plain, prompt):
            ((ids, _),) = run(engine, make_request(prompt, max_new_tokens=24, **options))
            assert ids == generate(plain, prompt, max_new_tokens=24, **options), options


def test_bans_hold_among_other_requests(engine: Engine, plain: Any) -> None:
    (prompt,) = some_prompts(30, vocabulary=512)
    cases = [{}, *forbidden(plain, prompt), {}]
    requests = [make_request(prompt, max_new_tokens=24, id=str(n), **case) for n, case in enumerate(cases)]
    expected = [generate(plain, prompt, max_new_tokens=24, **case) for case in cases]
    assert [run_ids for run_ids, _ in run(engine, *requests[:8])] == expected[:8]
    assert [run_ids for run_ids, _ in run(engine, *requests[8:])] == expected[8:]


def test_drafts_change_no_answer_with_bans() -> None:
    model = model_of("llama")
    (prompt,) = some_prompts(12)
    prompt = prompt * 3
    cases = [{"no_repeat_ngram_size": 12}, {"bad_words_ids": [list(prompt[:2]), list(prompt[4:7])]}]
    expected = [generate(model, prompt, max_new_tokens=60, **case) for case in cases]
    engine = BatchingEngine(
        model, EngineLimits(max_sequences=1, context_tokens=256, max_waiting=8, draft_tokens=8)
    )
    answers = [run(engine, make_request(prompt, max_new_tokens=60, **case))[0][0] for case in cases]
    drafted = engine.stats().drafted_tokens
    engine.close()
    assert answers == expected
    assert drafted > 0, "nothing was drafted: proves nothing"


def test_only_allowed_tokens_are_chosen(engine: Engine) -> None:
    allowed = [3, 40, 41, 200]
    ((ids, _),) = run(engine, make_request(allowed_token_ids=allowed, temperature=2.0, seed=1))
    assert set(ids) <= set(allowed)
    ((ids, reason),) = run(engine, make_request(allowed_token_ids=[5], stop_ids=frozenset({5})))
    assert (ids, reason) == ([], "stop")


@pytest.mark.parametrize("least", [{"min_length": 12}, {"min_new_tokens": 5}, {"min_length": 3}, {}])
def test_the_least_length_and_end_tokens_are_those_of_generate(
    engine: Engine, plain: Any, least: dict[str, int]
) -> None:
    (prompt,) = some_prompts(8, vocabulary=512)
    answer = generate(plain, prompt)
    ends = [answer[2], answer[7]]
    ids = torch.tensor([prompt])
    made = plain.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16,
        eos_token_id=ends, pad_token_id=2, **least,
    )[0, len(prompt) :].tolist()  # fmt: skip
    expected = made[:-1] if made[-1] in ends else made
    wanted = least.get("min_new_tokens", max(0, least.get("min_length", 0) - len(prompt)))
    request = make_request(prompt, stop_ids=frozenset(ends), min_new_tokens=wanted)
    assert run(engine, request)[0][0] == expected


def test_a_request_that_allows_nothing_is_refused_and_the_next_is_served(engine: Engine) -> None:
    nothing = {"allowed_token_ids": [5], "suppress_tokens": [5]}
    for temperature in (0.0, 1.0):
        with pytest.raises(RequestError, match="no token is left that this request allows"):
            run(engine, make_request(temperature=temperature, **nothing))
    assert run(engine, make_request())[0][1] == "length"


@settings(max_examples=200)
@given(SMALL, SMALL, st.integers(1, 6))
def test_ngrams_are_those_a_search_of_everything_finds(
    prompt: list[int], answer: list[int], size: int
) -> None:
    ngrams, ids = RepeatedNgrams(size, prompt), list(prompt)
    for token in answer:
        begun = ids[len(ids) + 1 - size :] if size > 1 else []
        runs = [ids[at : at + size] for at in range(len(ids) - size + 1)]
        assert set(ngrams.completing().tolist()) == {run[-1] for run in runs if run[:-1] == begun}
        ngrams.push(token)
        ids.append(token)


@settings(max_examples=200)
@given(SMALL, SMALL, st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=4))
def test_bad_words_are_those_a_search_of_everything_finds(
    prompt: list[int], answer: list[int], words: list[list[int]]
) -> None:
    found, ids = BadWords(words, prompt), list(prompt)
    for token in answer:
        ends = {word[-1] for word in words if len(word) > 1 and ids[1 - len(word) :] == word[:-1]}
        assert set(found.completing()) == ends
        found.push(token)
        ids.append(token)


def test_a_bad_word_does_not_forbid_to_end_the_answer() -> None:
    ending = Sampler(Sampling(4, bad_words_ids=[[0], [1]], stop_ids=frozenset({0})), (4,))
    (choice,) = TokenChooser().choose(LOGITS.unsqueeze(0), [ending.row()])
    assert choice.token == 0


def test_requests_without_bans_are_chosen_for_by_the_likeliest_token_alone() -> None:
    assert Sampler(Sampling(4), (1,)).row().is_plain
    assert not Sampler(Sampling(4, no_repeat_ngram_size=2), (1,)).row().is_plain
    early = Sampler(Sampling(4, min_new_tokens=1, stop_ids=frozenset({3})), (1,))
    assert not early.row().is_plain
    early.take(early.row(), Choice(5))
    assert early.row().is_plain
