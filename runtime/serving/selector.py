"""Shares the event loop's turns out: probes first, and only so many of the other sockets in one turn.

asyncio serves every ready socket before it looks again. When a thousand requests arrive together, such a
turn takes 100 ms, the next as long, and a probe waits for both. Does not know HTTP beyond a request's
first bytes. Start at `ProbesFirst.select`.
"""

import selectors
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

AT_ONCE = 32
"""Sockets read in one turn; a refused request costs about 0.2 ms, so a turn stays under 10 ms."""

Ready = tuple[selectors.SelectorKey, int]


class ProbesFirst(selectors.DefaultSelector):
    """The platform's selector, with an order in what is ready."""

    def __init__(self, listeners: Iterable[socket.socket], paths: Iterable[str]) -> None:
        """`listeners` are always served; a GET of one of `paths` on any connection is a probe."""
        super().__init__()
        self._always = {listener.fileno() for listener in listeners}
        self._probes = tuple(f"GET {path}".encode() for path in paths)
        self._longest = max(map(len, self._probes))
        self._turn = 0
        self._served: dict[int, int] = {}
        """Turn in which a descriptor was last served."""
        self._others: set[int] = set()
        """Descriptors whose waiting bytes were looked at: no probe."""

    def select(self, timeout: float | None = None) -> list[Ready]:
        """Return what is ready and may be served in this turn; the rest stays ready for the next."""
        ready: list[Ready] = super().select(timeout)
        if len(ready) <= AT_ONCE:
            return ready
        self._turn += 1
        first = [one for one in ready if self._goes_first(*one)]
        chosen = {key.fd for key, _ in first}
        rest = [one for one in ready if one[0].fd not in chosen]
        rest.sort(key=lambda one: self._served.get(one[0].fd, 0))  # who waited longest; stable
        for key, _ in rest[:AT_ONCE]:
            self._served[key.fd] = self._turn
            self._others.discard(key.fd)
        return first + rest[:AT_ONCE]

    def unregister(self, fileobj: "FileDescriptorLike") -> selectors.SelectorKey:
        """Forget a descriptor."""
        key: selectors.SelectorKey = super().unregister(fileobj)
        self._served.pop(key.fd, None)
        self._others.discard(key.fd)
        return key

    def _goes_first(self, key: selectors.SelectorKey, events: int) -> bool:
        """Whether this is a listener, something to write, the loop's own wake-up, or a probe."""
        if events & selectors.EVENT_WRITE or key.fd in self._always:
            return True
        if key.fd in self._others:
            return False
        begins = _peek(key.fd, self._longest)
        if begins is None or begins.startswith(self._probes):
            return True
        self._others.add(key.fd)
        return False


def _peek(descriptor: int, count: int) -> bytes | None:
    """Return the first bytes that wait on a TCP socket, None where the descriptor is something else."""
    try:
        borrowed = socket.socket(-1, socket.SOCK_STREAM, 0, fileno=descriptor)  # asks for the family only
    except OSError:
        return None
    try:
        if borrowed.family not in {socket.AF_INET, socket.AF_INET6}:
            return None
        return borrowed.recv(count, socket.MSG_PEEK)
    except OSError:  # gone: reading it will say so
        return b""
    finally:
        borrowed.detach()
