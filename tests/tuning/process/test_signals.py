"""SIGTERM outside and within `StopSignal.deferred`."""

import os
import signal
import subprocess
import sys

import pytest

from runtime.errors import StoppedError
from runtime.tuning.process.signals import EXIT_STOPPED, StopSignal


def test_signal_raises_at_once_outside_deferred() -> None:
    with StopSignal().installed(), pytest.raises(StoppedError, match="stopped by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_signal_within_deferred_is_only_recorded() -> None:
    stop = StopSignal()
    with stop.installed(), stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_a_process_whose_parent_is_gone_already_ends_too() -> None:
    code = "from runtime.tuning.process.signals import end_with_parent as end; end({}); print('alive')"
    for parent, status in ((os.getpid(), 0), (1, -signal.SIGTERM)):
        ended = subprocess.run([sys.executable, "-c", code.format(parent)], capture_output=True, check=False)
        assert ended.returncode == status


def test_previous_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal().installed():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_second_signal_ends_the_process() -> None:
    code = (
        "import os, signal; from runtime.tuning.process.signals import StopSignal\n"
        "stop = StopSignal()\n"
        "with stop.installed(), stop.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == EXIT_STOPPED
