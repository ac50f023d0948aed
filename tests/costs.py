"""What work costs: processor time against processor time of the same run, never against a number of seconds.

A machine that does other work takes longer for both. Does not know what is measured.
"""

import json
import time
from collections.abc import Callable

TRIES = 8
_FOUR_MB = b"[" + b"0," * 2_000_000 + b"0]"


def thread_time_of(work: Callable[[], object]) -> float:
    """Return the seconds of processor time that this thread takes for `work`."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def plain_pass_s() -> float:
    """Return the seconds of processor time of a plain parse of 4 MB of JSON."""
    return thread_time_of(lambda: json.loads(_FOUR_MB))


def assert_linear(work: Callable[[int], object], few: int, many: int) -> None:
    """Assert that `work` on `many` costs nearer to proportionally than to quadratically more than on `few`.

    The least of some tries of each: what else the machine does only ever adds to them.
    """
    most = (many / few) ** 1.5
    small = large = float("inf")
    for _ in range(TRIES):
        small = min(small, thread_time_of(lambda: work(few)))
        large = min(large, thread_time_of(lambda: work(many)))
        if large < most * small:
            return
    raise AssertionError(f"{few} cost {small:.4f} s, {many} {large:.4f} s: over {most:.0f} times as much")


def assert_cheap(work: Callable[[], object], plain: Callable[[], object], *, times: float) -> None:
    """Assert that this thread takes for `work` at most `times` what it takes for `plain`."""
    cost = unit = float("inf")
    for _ in range(TRIES):
        unit = min(unit, thread_time_of(plain))
        cost = min(cost, thread_time_of(work))
        if cost < times * unit:
            return
    raise AssertionError(f"{cost:.4f} s is more than {times} times {unit:.4f} s")
