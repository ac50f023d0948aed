"""Closes connections whose clients do not read what they are sent.

Knows one transport and the clock, nothing of HTTP: asyncio says when bytes wait in the transport and when
they have left it, and uvicorn does not write in between. So an unread stream holds one event in memory, and
its place until its client is cut off here. Start at `WriteWatch`.
"""

import asyncio
import logging
import socket

log = logging.getLogger(__name__)

CHECKS = 8
"""How often within `stall_s` progress is looked for."""
UNSENT_BYTES = 128 << 10
"""What the kernel takes of an answer before it is sent (TCP_NOTSENT_LOWAT): its own limit is megabytes."""


def limit_unsent(listener: socket.socket) -> None:
    """Have the kernel hold little of what cannot be sent yet, on every connection to `listener`."""
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux and macOS
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


class WriteWatch:
    """Watches one connection from `paused` (bytes wait) to `resumed` (none do) or `closed`.

    A client is cut off when it takes nothing for `stall_s`, or when bytes still wait at the request's
    deadline, `timeout_s` after `request` and `stall_s` after they began to; one that reads slowly is not.
    """

    def __init__(self, transport: asyncio.Transport, *, stall_s: float, timeout_s: float) -> None:
        # Above 0 bytes the transport calls pause_writing: uvicorn writes again once all is with the kernel.
        transport.set_write_buffer_limits(high=0)
        self._transport = transport
        self._stall_s, self._timeout_s = stall_s, timeout_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = self._loop.time() + timeout_s
        self._cut_at = 0.0
        self._progress_at = 0.0
        self._waiting_bytes = 0

    def request(self) -> None:
        """Note that a request has arrived: its deadline is that of its answer's writes."""
        self._deadline = self._loop.time() + self._timeout_s

    def paused(self) -> None:
        """Begin to watch."""
        if self._timer is None:
            now = self._loop.time()
            self._progress_at, self._cut_at = now, max(now + self._stall_s, self._deadline)
            self._waiting_bytes = self._transport.get_write_buffer_size()
            self._check_later()

    def resumed(self) -> None:
        """End: everything has left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    closed = resumed

    def _check_later(self) -> None:
        self._timer = self._loop.call_later(self._stall_s / CHECKS, self._check)

    def _check(self) -> None:
        now, waiting = self._loop.time(), self._transport.get_write_buffer_size()
        if waiting < self._waiting_bytes:
            self._progress_at = now
        self._waiting_bytes = waiting
        silent_s = now - self._progress_at
        if silent_s < self._stall_s and now < self._cut_at:
            self._check_later()
            return
        self._timer = None
        peer = self._transport.get_extra_info("peername") or "?"
        log.warning(
            "Cut off %s: it left %s bytes of its answer unread, nothing read for %.0f s",
            peer[0],
            waiting,
            silent_s,
        )
        self._transport.abort()
