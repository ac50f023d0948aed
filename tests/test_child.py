"""Processes that work for a server: what reaches them, and when they end."""

import json
import os
import signal

import pytest

from runtime import child


def test_a_child_ends_with_its_server_and_with_nothing_else() -> None:
    process, channel = child.start("tests.child_program", {"WORD": "a=b c"})
    channel.settimeout(60)
    try:
        with channel.makefile("rwb") as lines:
            about = {"group": process.pid, "session": os.getsid(0), "word": "a=b c", "input": ""}
            assert json.loads(lines.readline()) == about
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                process.send_signal(number)
            lines.write(b"still there\n")
            lines.flush()
            assert lines.readline() == b"still there\n"
        channel.close()  # as the kernel does for a server that ends
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_child_that_cannot_be_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child.sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        child.start("tests.child_program")
