"""What test_forks.py has copied: it answers with the greeting, or does what takes too much."""

import os
import socket

from runtime import child, forks

MEMORY_BYTES = 64 << 20
CPU_S = 0.2


def main() -> None:
    """Read the greeting, then fork."""
    control = child.begin()
    greeting = forks.read(control)
    forks.serve(control, lambda channel: work(channel, greeting))


def work(channel: socket.socket, greeting: bytes) -> None:
    """Answer until the other end is closed."""
    forks.limit_memory(MEMORY_BYTES, 0)
    while True:
        try:
            message = forks.read(channel)
        except EOFError:
            return
        with forks.processor_time(CPU_S):
            if message == b"loop":
                while True:
                    pass
            if message == b"hoard":
                bytearray(MEMORY_BYTES * 2)
        forks.send(channel, str(os.getpid()).encode() if message == b"pid" else greeting + b" " + message)


if __name__ == "__main__":
    main()
