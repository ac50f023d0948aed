"""A process that works for the server: in a group of its own, deaf to signals, told when the server ends.

The server holds one end of a pair of sockets, the process has the other as standard input: whatever ends the
server closes that pair. Does not know what is said over it. Start at `start` in the server, `begin` in the
process.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "VLLM_API_KEY",
    "RUNTIME_API_KEY",
    "AZURE_CLIENT_SECRET",
    "COSIGN_PASSWORD",
)
"""Variables that a process which works on what clients wrote has no use for."""


def start(
    module: str,
    environment: Mapping[str, str] = MappingProxyType({}),
    *,
    without: Sequence[str] = (),
) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Run `module` with more variables, and `without` some of this process's.

    Returns the process, and the server's end of its standard input.
    """
    here, there = socket.socketpair()
    command = [sys.executable, "-m", module]
    if environment or without:
        unset = [f"--unset={name}" for name in without]
        command = ["env", *unset, *(f"{name}={value}" for name, value in environment.items()), *command]
    with there:
        try:
            # A group of its own: Ctrl-C on a terminal is handled by the server. Not a session: the kernel may
            # share processors among sessions first (sched_autogroup), where niceness means nothing.
            process = subprocess.Popen(command, stdin=there.fileno(), process_group=0)  # noqa: S603
        except BaseException:
            here.close()
            raise
    return process, here


def begin() -> socket.socket:
    """Ignore the signals that the server handles, and return this process's end of the pair."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return channel
