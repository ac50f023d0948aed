"""Copies of a host: each does its task, is killed at its limits, and costs the others nothing."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import child, forks
from runtime.errors import UnavailableError
from runtime.oci.access import KEY_PASSWORD


@pytest.fixture(scope="module")
def host() -> Iterator[forks.ForkHost]:
    made = forks.ForkHost("tests.fork_program", "tests", lambda: [b"greeting"])
    yield made
    made.close()


def asked(host: forks.ForkHost, *messages: bytes) -> list[bytes]:
    channel = host.fork()
    channel.settimeout(60)
    with channel:
        answers = []
        for message in messages:
            forks.send(channel, message)
            answers.append(forks.read(channel))
        return answers


def test_copies_have_the_greeting_and_answer_message_by_message(host: forks.ForkHost) -> None:
    assert asked(host, b"a", b"", b"c" * 100_000) == [
        b"greeting a",
        b"greeting ",
        b"greeting " + b"c" * 100_000,
    ]


@pytest.mark.parametrize("misuse", [b"loop", b"hoard"])
def test_copy_that_takes_too_much_ends_alone(host: forks.ForkHost, misuse: bytes) -> None:
    with pytest.raises((EOFError, OSError)):
        asked(host, misuse)
    assert asked(host, b"a") == [b"greeting a"]


def test_host_that_was_killed_is_started_again(host: forks.ForkHost) -> None:
    asked(host, b"a")
    assert host._process is not None
    os.kill(host._process.pid, signal.SIGKILL)
    host._process.wait()
    assert asked(host, b"a") == [b"greeting a"]


def test_copies_have_no_secrets_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """They work on what clients wrote: what takes one over shall find nothing."""
    for name in {*child.SECRETS, KEY_PASSWORD}:
        monkeypatch.setenv(name, "SECRETSECRET")
    monkeypatch.setenv("KEPT", "yes")
    made = forks.ForkHost("tests.fork_program", "tests", lambda: [b"greeting"])
    try:
        asked(made, b"pid")
        assert made._process is not None
        environment = Path(f"/proc/{made._process.pid}/environ").read_bytes()  # a copy has its host's
    finally:
        made.close()
    assert b"KEPT=yes" in environment
    assert b"SECRETSECRET" not in environment


def test_message_longer_than_expected_is_not_read(host: forks.ForkHost) -> None:
    with host.fork() as channel:
        forks.send(channel, b"a" * 100)
        with pytest.raises(EOFError):
            forks.read(channel, 50)


def test_closed_host_is_not_started_again() -> None:
    made = forks.ForkHost("tests.fork_program", "tests")
    made.close()
    with pytest.raises(UnavailableError):
        made.fork()


def test_no_copy_outlives_its_socket(host: forks.ForkHost) -> None:
    (pid,) = asked(host, b"pid")
    for _ in range(6000):
        if not Path(f"/proc/{pid.decode()}").exists():
            return
        signal.sigtimedwait([], 0.01)
    pytest.fail("the copy still runs")
