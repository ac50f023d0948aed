"""Requests and tokens per minute, on a clock of the test."""

import pytest

from runtime.errors import RateLimitError
from runtime.serving.rate_limits import Budget, Rates, duration


class Clock:
    """A time that passes when it is told."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_requests_beyond_the_minute_wait_for_the_next_place() -> None:
    clock = Clock()
    budget = Budget("a", Rates(requests_per_minute=2), clock)
    budget.take_request()
    budget.take_request()
    with pytest.raises(
        RateLimitError, match="'a' is limited to 2 requests per minute; try again in 30s"
    ) as refused:
        budget.take_request()
    assert refused.value.retry_after_s == pytest.approx(30)
    clock.now_s += 30
    budget.take_request()
    assert (budget.used["requests"], budget.refused["requests"]) == (3, 1)


def test_a_bucket_holds_a_minutes_worth_and_no_more() -> None:
    clock = Clock()
    budget = Budget("a", Rates(requests_per_minute=2), clock)
    clock.now_s += 3600
    budget.take_request()
    budget.take_request()
    with pytest.raises(RateLimitError):
        budget.take_request()


def test_tokens_are_reserved_at_most_and_what_was_not_used_comes_back() -> None:
    clock = Clock()
    budget = Budget("a", Rates(tokens_per_minute=100), clock)
    first = budget.reserve(10, 70)
    with pytest.raises(RateLimitError, match="100 tokens per minute; this request may use 40"):
        budget.reserve(10, 30)
    first.settle(5)
    budget.reserve(10, 30).cancel()
    assert (budget.used["prompt"], budget.used["generation"], budget.refused["tokens"]) == (10, 5, 1)
    assert dict(budget.headers())[b"x-ratelimit-remaining-tokens"] == b"85"


def test_a_request_of_more_than_a_minute_passes_a_full_bucket_and_is_paid_off() -> None:
    clock = Clock()
    budget = Budget("a", Rates(tokens_per_minute=100), clock)
    budget.reserve(50, 250).settle(250)
    with pytest.raises(RateLimitError) as refused:
        budget.reserve(1, 0)
    assert refused.value.retry_after_s == pytest.approx((200 + 1) / 100 * 60)
    clock.now_s += refused.value.retry_after_s
    budget.reserve(1, 0)


def test_headers_are_whole_numbers_and_durations() -> None:
    clock = Clock()
    budget = Budget("a", Rates(60, 6000), clock)
    budget.take_request()
    budget.reserve(500, 100)
    assert dict(budget.headers()) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"5400",
        b"x-ratelimit-reset-tokens": b"6s",
    }
    assert Budget().headers() == []


def test_other_rates_start_full_and_the_same_ones_stay() -> None:
    budget = Budget("a", Rates(requests_per_minute=1), Clock())
    budget.take_request()
    budget.change(Rates(requests_per_minute=1))
    with pytest.raises(RateLimitError):
        budget.take_request()
    budget.change(Rates(requests_per_minute=2))
    budget.take_request()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0201, "21ms"), (0.9999, "1s"), (8.64, "8.64s"), (60, "1m0s"), (3661.5, "61m1.5s")],
)
def test_durations_are_those_of_openais_headers(seconds: float, text: str) -> None:
    assert duration(seconds) == text
