"""Choosing a token: what truncation keeps, the formulas of the penalties, exact log probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serving.engine.protocol import Sampling
from runtime.serving.engine.sampling import SHORTLIST, Sampler, penalise_repetition, shortlist, truncate

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0])


def kept(**options: float) -> list[int]:
    cut = truncate(LOGITS, Sampling(max_new_tokens=1, **options))  # type: ignore[arg-type]
    return [index for index, value in enumerate(cut.tolist()) if value != -torch.inf]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"top_p": 0.0}, [0]),
        ({"min_p": 0.3}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "min_p": 0.3}, [0, 1]),
    ],
)
def test_truncation_keeps_the_likeliest(options: dict[str, float], expected: list[int]) -> None:
    assert kept(**options) == expected


def test_repetition_divides_positive_and_multiplies_negative_logits() -> None:
    changed = penalise_repetition(LOGITS, torch.tensor([0, 3, 3]), 2.0)
    assert changed.tolist() == [1.0, 1.0, 0.5, -2.0, 0.0]


def test_presence_and_frequency_count_generated_tokens_not_the_prompt() -> None:
    sampler = Sampler(Sampling(9, presence_penalty=0.6, frequency_penalty=0.5), (0, 0, 0))
    assert [sampler.choose(LOGITS).id for _ in range(3)] == [0, 1, 0]


def test_a_bias_of_a_hundred_decides_the_token() -> None:
    assert Sampler(Sampling(1, logit_bias={3: 100.0}), (0,)).choose(LOGITS).id == 3


def test_logprobs_are_those_of_the_model_before_temperature() -> None:
    token = Sampler(Sampling(1, temperature=0.3, top_k=1, top_logprobs=2), (0,)).choose(LOGITS)
    expected = LOGITS.log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[0]))
    assert [index for index, _ in token.top] == [0, 1]
    assert token.top[1][1] == pytest.approx(float(expected[1]))


def test_sampling_follows_the_distribution() -> None:
    sampler = Sampler(Sampling(1, temperature=1.0, seed=3), (0,))
    counts = torch.bincount(torch.tensor([sampler.choose(LOGITS).id for _ in range(4000)]), minlength=5)
    assert (counts / 4000 - LOGITS.softmax(-1)).abs().max() < 0.03


@settings(max_examples=60)
@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 50),
    st.integers(-(2**63), 2**63 - 1),
)
def test_a_token_of_the_vocabulary_is_chosen_whatever_the_settings(
    values: list[float], top_p: float, min_p: float, top_k: int, seed: int
) -> None:
    sampling = Sampling(1, temperature=0.7, top_p=top_p, min_p=min_p, top_k=top_k, seed=seed)
    chosen = Sampler(sampling, (0,)).choose(torch.tensor(values)).id
    assert chosen is not None
    assert 0 <= chosen < len(values)


@settings(max_examples=150)
@given(
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 1e-6, 0.05, 1.0]),
    st.sampled_from([0, 1, 20, SHORTLIST - 1, SHORTLIST, SHORTLIST + 1, 900]),
    st.sampled_from([0.1, 1.0, 8.0]),
    st.booleans(),
)
def test_the_shortlist_equals_truncation_or_is_none(
    seed: int, top_p: float, min_p: float, top_k: int, spread: float, ties: bool
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(1000) * spread
    if ties:
        scores = scores.round()
    sampling = Sampling(1, temperature=1.0, top_p=top_p, min_p=min_p, top_k=top_k)
    kept = truncate(scores, sampling)
    expected = [index for index, value in enumerate(kept.tolist()) if value != -torch.inf]
    short = shortlist(scores, sampling)
    if short is None:
        assert max(len(expected), top_k) >= SHORTLIST or ties
        return
    ids, values = short
    assert torch.equal(values, scores[ids])
    # sums in another order: the token on the border of top_p or min_p may fall on either side
    border = int(top_p < 1.0 or min_p > 0.0)
    if not ties:  # among equals at the border either may stay
        assert len(set(ids.tolist()) ^ set(expected)) <= border
    assert abs(len(ids) - len(expected)) <= border


TINY = [1e-5 / 2, 1e-7, 1e-38, 1e-40, 1.4e-45, 1e-320, 5e-324]


@pytest.mark.parametrize("temperature", TINY)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4, 1e30])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature: float, spread: float) -> None:
    sampler = Sampler(Sampling(9, temperature=temperature, top_p=0.9, top_k=3, min_p=0.1), (0,))
    assert sampler.is_greedy
    assert sampler.choose(LOGITS * spread).id == 0


SMALLEST = [5e-324, 1e-320, 1.4e-45, 1e-40, 1e-38, 1e-30, 1e-5, 0.01]


@settings(max_examples=300)
@given(
    values=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=2, max_size=40),
    temperature=st.sampled_from([1e-5, 1e-4, 1.0, 100.0]),
    top_p=st.sampled_from([0.0, *SMALLEST, 1.0]),
    min_p=st.sampled_from([0.0, *SMALLEST, 1.0]),
    penalty=st.sampled_from([*SMALLEST, 1.0, 100.0]),
    bias=st.sampled_from([-100.0, 0.0, 100.0]),
    counts=st.sampled_from([-2.0, 0.0, 2.0]),
)
def test_no_setting_makes_a_probability_that_is_no_number(
    values: list[float],
    temperature: float,
    top_p: float,
    min_p: float,
    penalty: float,
    bias: float,
    counts: float,
) -> None:
    options = {"top_p": top_p, "min_p": min_p, "repetition_penalty": penalty}
    options |= {"presence_penalty": counts, "frequency_penalty": counts}
    made = Sampling(9, temperature=temperature, logit_bias={0: bias, 1: bias}, seed=1, **options)
    sampler = Sampler(made, (0,))
    logits = torch.tensor(values)
    for _ in range(3):
        scores = sampler._adjusted(logits)
        assert not scores.isnan().any()
        assert scores.max() < torch.inf
        chosen = sampler.choose(logits).id
        assert chosen is not None
        assert scores[chosen] > -torch.inf


def test_a_banned_token_is_never_drawn() -> None:
    sampler = Sampler(Sampling(999, temperature=100.0, seed=1, suppress_tokens=[0, 2, 4]), (0,))
    assert {sampler.choose(LOGITS).id for _ in range(400)} == {1, 3}
