"""Where the arenas of the key-value pool hold each sequence: extents, and the room between them.

An arena has the positions of all layers of one kind (kv_pool.py); each sequence has one extent in each arena.
Pure Python over numbers: does not know tensors, tokens or requests. Start at `Arena`.
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Extent:
    """Positions of a sequence from `base` on lie from `start` on in an arena, up to `capacity` of them."""

    start: int
    capacity: int
    base: int = 0
    """Above 0 only where a window has passed: positions below it are no longer held."""

    @property
    def end(self) -> int:
        """The arena position after its last."""
        return self.start + self.capacity


@dataclass(frozen=True, slots=True)
class Move:
    """Copy `count` positions of arena `kind` from `source` to `target`, in all of its layers."""

    kind: int
    source: int
    target: int
    count: int


class Arena:
    """The extents of one arena and the gaps between them."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.used = 0
        """Positions in extents."""
        self._extents: list[Extent] = []
        """By start."""

    @property
    def free(self) -> int:
        """Positions in gaps."""
        return self.positions - self.used

    def allocate(self, capacity: int) -> Extent | None:
        """Return a new extent in the smallest gap that holds it; None where no gap does."""
        gaps = [(end - start, start) for start, end in self._gaps() if end - start >= capacity]
        if not gaps:
            return None
        extent = Extent(min(gaps)[1], capacity)
        self._insert(extent)
        return extent

    def release(self, extent: Extent) -> None:
        """Make a gap of `extent`."""
        del self._extents[self._index(extent)]
        self.used -= extent.capacity

    def resize(self, extent: Extent, capacity: int) -> None:
        """Give `extent` another capacity; there must be room behind it for more."""
        self.used += capacity - extent.capacity
        extent.capacity = capacity

    def room_behind(self, extent: Extent) -> int:
        """Return how many positions behind `extent` are free."""
        index = self._index(extent) + 1
        return (self._extents[index].start if index < len(self._extents) else self.positions) - extent.end

    def gather(self, capacity: int, *, most: int | None = None) -> list[tuple[Extent, int]] | None:
        """Make a gap of `capacity` by moving few extents down; return them and their former starts, in order.

        There must be as much room in all gaps together. None where more than `most` positions would be moved.
        """
        ends = [0, *(extent.end for extent in self._extents)]
        starts = [*(extent.start for extent in self._extents), self.positions]
        gaps = [start - end for end, start in zip(ends, starts, strict=True)]
        first = room = cost = 0
        cheapest: tuple[int, int, int] | None = None
        for last, gap in enumerate(gaps):  # the gaps from the first to the last one become one
            room += gap
            cost += self._extents[last - 1].capacity if last else 0
            while first < last and room - gaps[first] >= capacity:
                room, cost, first = room - gaps[first], cost - self._extents[first].capacity, first + 1
            if room >= capacity and (cheapest is None or cost < cheapest[0]):
                cheapest = cost, first, last
        assert cheapest is not None, "less room than was counted"  # noqa: S101
        cost, first, last = cheapest
        if most is not None and cost > most:
            return None
        moved, cursor = [], ends[first]
        for extent in self._extents[first:last]:
            if extent.start > cursor:
                moved.append((extent, extent.start))
                extent.start = cursor
            cursor = extent.end
        return moved

    def rearrange(self, growth: Mapping[Extent, int]) -> list[tuple[Extent, int]]:
        """Make extents larger by `growth`, moving each at most once; return as `gather` does.

        There must be as much room in all gaps together.
        """
        for extent, more in growth.items():
            self.resize(extent, extent.capacity + more)
        highest, sources = self.positions - self.used, [extent.start for extent in self._extents]
        cursor = 0
        for extent in self._extents:
            # where it is, unless the one before reaches so far or those behind need the room
            extent.start = min(max(cursor, extent.start), highest)
            cursor, highest = extent.end, highest + extent.capacity
        moved = [it for it in zip(self._extents, sources, strict=True) if it[0].start != it[1]]
        down = [(extent, source) for extent, source in moved if extent.start < source]
        return down + [(extent, source) for extent, source in reversed(moved) if extent.start > source]

    def _gaps(self) -> list[tuple[int, int]]:
        starts = [*(extent.start for extent in self._extents), self.positions]
        ends = [0, *(extent.end for extent in self._extents)]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if start > end]

    def _insert(self, extent: Extent) -> None:
        bisect.insort(self._extents, extent, key=lambda each: each.start)
        self.used += extent.capacity

    def _index(self, extent: Extent) -> int:
        index = bisect.bisect_left(self._extents, extent.start, key=lambda each: each.start)
        assert self._extents[index] is extent, "an extent of another arena"  # noqa: S101
        return index
