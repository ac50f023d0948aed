"""Where the arenas of the key-value pool hold each sequence: extents, and the room between them.

An arena has the positions of all layers of one kind (kv_pool.py); each sequence has one extent in each arena.
Pure Python over numbers: does not know tensors, tokens or requests. Start at `Arena`.
"""

import bisect
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

    def gather(self, capacity: int) -> list[tuple[Extent, int]]:
        """Make a gap of `capacity` by moving extents down; return them and their former starts, in order.

        There must be as much room in all gaps together.
        """
        moved, cursor = [], 0
        for extent in self._extents:
            if extent.start - cursor >= capacity:
                break
            if extent.start > cursor:
                moved.append((extent, extent.start))
                extent.start = cursor
            cursor = extent.end
        return moved

    def gather_behind(self, extent: Extent, room: int) -> list[tuple[Extent, int]]:
        """Have `room` free positions behind `extent`, as `gather` does: others are moved down, then up."""
        index, moved, cursor = self._index(extent), [], 0
        for each in self._extents[: index + 1]:
            if each.start > cursor:
                moved.append((each, each.start))
                each.start = cursor
            cursor = each.end
        behind, shifts = self._extents[index + 1 :], []
        ceilings = [*(each.start for each in behind[1:]), self.positions]
        missing = room - self.room_behind(extent)
        for each, ceiling in zip(behind, ceilings, strict=False):
            if missing <= 0:
                break
            shifts.append((each, missing))
            missing -= ceiling - each.end  # the gap behind it takes so much of the shift
        for each, shift in reversed(shifts):
            moved.append((each, each.start))
            each.start += shift
        return moved

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
