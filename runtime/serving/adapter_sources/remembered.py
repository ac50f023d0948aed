"""What is known for a while of names that could not be loaded, so that asking again costs no registry.

A bounded table of the event loop. Start at `RememberedFailures`.
"""

from collections import OrderedDict
from collections.abc import Callable

from runtime.errors import Failure

MOST_NAMES = 4096
"""Names come from clients: those remembered the longest leave first."""


class RememberedFailures:
    """Failures by name, each until its time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[float, Failure]] = OrderedDict()

    def put(self, name: str, failure: Failure, *, seconds: float) -> None:
        """Remember `failure` of `name` for `seconds`."""
        self._failures.pop(name, None)
        self._failures[name] = (self._clock() + seconds, failure)
        if len(self._failures) > MOST_NAMES:
            self._failures.popitem(last=False)

    def get(self, name: str) -> Failure | None:
        """Return the failure of `name`, None where there is none that is still valid."""
        until, failure = self._failures.get(name, (0.0, None))
        if failure is not None and self._clock() >= until:
            del self._failures[name]
            return None
        return failure
