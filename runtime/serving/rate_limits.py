"""How many requests and tokens a key may use per minute, and how many it has used.

Two token buckets: each holds a minute's worth when full and refills evenly. Used on the event loop only. Does
not know keys, files or HTTP beyond the names of OpenAI's headers. Start at `Budget`.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from runtime.errors import RateLimitError

MINUTE_S = 60.0
ROUNDING = 1e-6
"""What may be missing of a request or token for want of digits."""

Unit = Literal["requests", "tokens"]


@dataclass(frozen=True, slots=True)
class Rates:
    """The limits of one key; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class Bucket:
    """A minute's worth of something, refilled evenly; `level` may be below zero, which is paid off first."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._since_s = clock()

    @property
    def level(self) -> float:
        """What is left."""
        now_s = self._clock()
        refilled = (now_s - self._since_s) * self.per_minute / MINUTE_S
        self._level, self._since_s = min(self.per_minute, self._level + refilled), now_s
        return self._level

    def wait_s(self, amount: float) -> float:
        """Return how long it takes until `amount` may be taken, or until the bucket is full if it is more."""
        missing = min(amount, self.per_minute) - self.level
        return missing * MINUTE_S / self.per_minute if missing > ROUNDING else 0.0

    def take(self, amount: float) -> None:
        """Take `amount`, or give it back where it is negative."""
        self._level = min(self.per_minute, self.level - amount)


class Budget:
    """The limits of one key and what it has used; keeps both when the file of keys is read again."""

    def __init__(
        self, name: str = "", rates: Rates = Rates(), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._clock = clock
        self.rates = rates
        self._buckets = self._filled(rates)
        self.used: Counter[str] = Counter()
        """`requests`, `prompt` and `generation` tokens since the server began."""
        self.refused: Counter[Unit] = Counter()
        """Requests refused, by the limit that they exceeded."""

    def _filled(self, rates: Rates) -> dict[Unit, Bucket]:
        limits: dict[Unit, int | None] = {
            "requests": rates.requests_per_minute,
            "tokens": rates.tokens_per_minute,
        }
        return {unit: Bucket(limit, self._clock) for unit, limit in limits.items() if limit is not None}

    def change(self, rates: Rates) -> None:
        """Take other limits from now on; buckets are full again where they differ."""
        if rates != self.rates:
            self.rates, self._buckets = rates, self._filled(rates)

    def take_request(self) -> None:
        """Count one request; RateLimitError where the minute's are used up."""
        self._take("requests", 1)
        self.used["requests"] += 1

    def reserve(self, prompt_tokens: int, new_tokens: int) -> "Reservation":
        """Take the most tokens that a request may use; RateLimitError where they are not there.

        One that asks for more than a minute's worth waits for a full bucket, and is paid off afterwards.
        """
        self._take("tokens", prompt_tokens + new_tokens)
        return Reservation(self, prompt_tokens, prompt_tokens + new_tokens)

    def _take(self, unit: Unit, amount: int) -> None:
        bucket = self._buckets.get(unit)
        if bucket is None:
            return
        if wait_s := bucket.wait_s(amount):
            self.refused[unit] += 1
            asked = f"; this request may use {amount}" if unit == "tokens" else ""
            raise RateLimitError(
                f"the key '{self._name}' is limited to {bucket.per_minute} {unit} per minute{asked}; "
                f"try again in {duration(wait_s)}",
                retry_after_s=wait_s,
            )
        bucket.take(amount)

    def settle(self, reservation: "Reservation", prompt_tokens: int, new_tokens: int) -> None:
        """Count what a request has used and give the rest of its reservation back."""
        self.used["prompt"] += prompt_tokens
        self.used["generation"] += new_tokens
        if (bucket := self._buckets.get("tokens")) is not None:
            bucket.take(prompt_tokens + new_tokens - reservation.tokens)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's headers of the limits: whole numbers, and the time until a bucket is full again."""
        made = []
        for unit, bucket in self._buckets.items():
            left, full_in_s = max(0, math.floor(bucket.level)), bucket.wait_s(bucket.per_minute)
            for name, value in (
                ("limit", bucket.per_minute),
                ("remaining", left),
                ("reset", duration(full_in_s)),
            ):
                made.append((f"x-ratelimit-{name}-{unit}".encode(), str(value).encode()))
        return made


@dataclass(frozen=True, slots=True)
class Reservation:
    """Tokens taken from a budget for one request, until it is known what it used."""

    budget: Budget
    prompt_tokens: int
    tokens: int
    """Prompt and answer together, at most."""

    def settle(self, new_tokens: int) -> None:
        """Count the prompt and `new_tokens`; give the rest back."""
        self.budget.settle(self, self.prompt_tokens, new_tokens)

    def cancel(self) -> None:
        """Give everything back: the request was not run."""
        self.budget.settle(self, 0, 0)


def duration(seconds: float) -> str:
    """Return a time as OpenAI's headers have it, Go's form: `6m0s`, `8.64s`, `20ms`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{text}s" if minutes else f"{text}s"
