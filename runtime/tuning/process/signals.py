"""SIGTERM and SIGINT: outside training they end the process at once, within it after a checkpoint.

Does not know what a checkpoint is. Start at `StopSignal`.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self

from runtime.errors import StoppedError

EXIT_STOPPED = 143
"""128 + SIGTERM, what a shell reports for a process that SIGTERM ended."""


class StopSignal:
    """Whether a signal has requested the process to stop.

    Outside `deferred` a signal raises StoppedError wherever the program is; within it only `requested`
    becomes true. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False

    def install(self) -> None:
        """Take over SIGTERM and SIGINT of this process (main thread only)."""
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, self._receive)

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """Within: SIGTERM and SIGINT are handled here; afterwards by their previous handlers."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.install()
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within: only set `requested`, raise nothing."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            os._exit(EXIT_STOPPED)
        self.requested = True
        if not self._deferring:
            raise StoppedError(
                f"stopped by {signal.Signals(number).name}; run the same command again to resume"
            )


def end_with_parent(parent: int | None = None) -> None:
    """Have Linux send SIGTERM when the parent dies: an orphan must not train beside its successor.

    Where `parent`, the id of the process that started this one, has died before that was said, end at once.
    """
    with suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
