"""Requests that wait, clients in turn: each client's own stay in order of arrival.

Does not know what the requests are. Start at `FairQueue.first`.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue by client. The first stays first until it is taken or removed."""

    def __init__(self) -> None:
        self._by_client: OrderedDict[str, deque[T]] = OrderedDict()
        self._size = 0

    def append(self, client: str, item: T) -> None:
        """Let `item` wait behind those of the same client."""
        self._by_client.setdefault(client, deque()).append(item)
        self._size += 1

    def first(self) -> T | None:
        """Return the next, or None."""
        client = next(iter(self._by_client), None)
        return None if client is None else self._by_client[client][0]

    def pop(self) -> T:
        """Take the first; its client's others then wait behind those of all other clients."""
        client, items = self._by_client.popitem(last=False)
        item = items.popleft()
        if items:
            self._by_client[client] = items
        self._size -= 1
        return item

    def remove(self, client: str, item: T) -> bool:
        """Take `item` out; whether it was there."""
        items = self._by_client.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._by_client[client]
        self._size -= 1
        return True

    def is_unfair_to(self, client: str) -> bool:
        """Whether nothing waits for `client` while several wait for another."""
        return client not in self._by_client and any(len(items) > 1 for items in self._by_client.values())

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        return (item for items in self._by_client.values() for item in items)
