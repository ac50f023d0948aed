"""What truncation keeps is what plain torch keeps, and draws follow its distribution, in a row as in many."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.serving.engine.protocol import Sampling
from runtime.serving.engine.truncation import SHORTLIST, UNDECIDED, Cut, draw, rank
from tests.serving.engine.plain_sampling import distribution, truncate


def cut_of(sampling: Sampling, rows: int) -> Cut:
    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows, 1), value, dtype=dtype)

    return Cut(
        column(sampling.top_k, torch.int64) if sampling.top_k else None,
        column(sampling.top_p, torch.float64) if sampling.top_p < 1 else None,
        column(sampling.min_p, torch.float64) if sampling.min_p else None,
    )


def evenly(count: int) -> Tensor:
    """Return (count, 1) float64: the middles of as many parts of [0, 1)."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / count).unsqueeze(1)


def drawn(scores: Tensor, sampling: Sampling, *, most: int, count: int = 2000) -> Tensor:
    """Return `count` tokens of `scores` (V,), for random numbers that are spread evenly."""
    rows = scores.expand(count, -1).contiguous()
    return draw(rows, cut_of(sampling, count), evenly(count), most=most)


@settings(max_examples=60)
@given(
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 1e-6, 0.05, 1.0]),
    st.sampled_from([0, 1, 7, 15, 16, 17, 50]),
    st.sampled_from([0.1, 1.0, 8.0]),
    st.booleans(),
)
@example(seed=0, top_p=0.0, min_p=0.0, top_k=0, spread=0.1, ties=True)
def test_what_is_kept_is_what_plain_torch_keeps_or_is_undecided(
    seed: int, top_p: float, min_p: float, top_k: int, spread: float, ties: bool
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(60) * spread
    if ties:
        scores = scores.round()
    scores -= scores.max()
    sampling = Sampling(1, temperature=1.0, top_p=top_p, min_p=min_p, top_k=top_k)
    expected = distribution(scores, sampling)
    whole = drawn(scores, sampling, most=60)
    short = drawn(scores, sampling, most=16)
    found = torch.bincount(whole, minlength=60) / len(whole)
    # sums in another order: the token on the border of top_p or min_p may fall on either side
    border = int(top_p < 1.0 or min_p > 0.0)
    beyond = found[(expected == 0)]
    assert int((beyond > 0).sum()) <= border
    if not int((beyond > 0).sum()):
        assert (found - expected).abs().max() <= 2 / len(whole) + (border and float(expected.max()) / 2)
    assert torch.equal(short, whole) or set(short.tolist()) == {UNDECIDED}
    if set(short.tolist()) == {UNDECIDED}:
        assert max(int((expected > 0).sum()), top_k) >= 16 or ties


def test_equal_scores_are_ranked_by_their_ids_alone_and_among_others() -> None:
    torch.manual_seed(0)
    scores = torch.randn(40, 5000).mul_(3).round_()
    values, ids = rank(scores, SHORTLIST)
    everything = rank(scores, 5000)
    inside = values > values[:, -1:]
    assert torch.equal(ids[inside], everything[1][:, :SHORTLIST][inside])
    for row in (0, 17, 39):
        one = rank(scores[row : row + 1], SHORTLIST)
        assert torch.equal(one[1][0][inside[row]], ids[row][inside[row]])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 40},
        {"temperature": 1.0, "min_p": 0.02},
        {"temperature": 1.2, "top_k": 60, "top_p": 0.8, "min_p": 0.01},
    ],
)
@pytest.mark.parametrize("most", [SHORTLIST, 400])
def test_random_draws_follow_the_exact_distribution(options: dict[str, float], most: int) -> None:
    torch.manual_seed(1)
    scores = torch.randn(400) * 2.5
    sampling = Sampling(1, **options)  # type: ignore[arg-type]
    expected = distribution(scores, sampling)
    scaled = (scores - scores.max()) / sampling.temperature
    count = 20_000
    rows = scaled.expand(count, -1).contiguous()
    got = draw(rows, cut_of(sampling, count), torch.rand(count, 1, dtype=torch.float64), most=most)
    assert UNDECIDED not in got
    counts = torch.bincount(got, minlength=400).double()
    assert counts[expected == 0].sum() == 0
    often = expected * count >= 5
    chi = ((counts - expected * count)[often] ** 2 / (expected * count)[often]).sum()
    degrees = int(often.sum()) - 1
    assert chi < degrees + 4 * (2 * degrees) ** 0.5


def test_a_row_is_drawn_alone_as_among_others_of_other_settings() -> None:
    torch.manual_seed(2)
    scores = torch.randn(32, 3000).mul_(4).bfloat16().float()  # many are equal
    scores -= scores.amax(-1, keepdim=True)
    mixed = Cut(
        torch.tensor([0, 5, 50, 0] * 8).unsqueeze(1),
        torch.tensor([0.9, torch.inf, 0.8, 0.5] * 8, dtype=torch.float64).unsqueeze(1),
        torch.tensor([0.0, 0.0, 0.01, 0.1] * 8, dtype=torch.float64).unsqueeze(1),
    )
    for uniform in torch.rand(20, 32, 1, dtype=torch.float64):
        together = draw(scores, mixed, uniform, most=SHORTLIST).tolist()
        for row, options in enumerate(
            [{"top_p": 0.9}, {"top_k": 5}, {"top_k": 50, "top_p": 0.8, "min_p": 0.01}]
        ):
            alone = cut_of(Sampling(1, temperature=1.0, **options), 1)  # type: ignore[arg-type]
            one = slice(row, row + 1)
            assert draw(scores[one], alone, uniform[one], most=SHORTLIST).tolist() == together[one]
            assert draw(scores[one], alone, uniform[one], most=3000).tolist() == together[one] != [UNDECIDED]
        everything = draw(scores, Cut(), uniform, most=0)
        assert draw(scores[3:4], Cut(), uniform[3:4], most=0).tolist() == everything[3:4].tolist()


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.5}])
@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_the_smallest_and_largest_random_numbers_draw_a_token_that_may_be_drawn(
    options: dict[str, float], number: float
) -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -0.5, -torch.inf, -1.0, -200.0]])
    sampling = Sampling(1, temperature=1.0, **options)  # type: ignore[arg-type]
    kept = truncate(scores[0], sampling) > -100
    got = draw(scores, cut_of(sampling, 1), torch.tensor([[number]], dtype=torch.float64), most=SHORTLIST)
    assert kept[got.item()]
    if number == 0 or not options:
        assert got.item() == (1 if number < 0.4 else 4 if number > 0.9 else 1)
