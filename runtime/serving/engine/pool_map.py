"""Which sequences have which extents of the key-value pool: those in flight, and ended ones as prefix cache.

Makes room for a sequence: beside the others, then in place of ended ones, then by moving what is in the way.
What is to be copied for that is collected as `moves`, which must be run before the next step. Pure Python
over numbers: does not know tokens or requests. Start at `PoolMap.place` and `PoolMap.reserve`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from runtime.memory.pool import window_span
from runtime.serving.engine.extents import Arena, Extent, Move

GROWTH = 2
"""A sequence that outgrows its extent gets one that is larger by a GROWTH-th."""
CROWDED_GROWTH = 8
"""Where others must be moved for that, all that are about to outgrow theirs get a CROWDED_GROWTH-th more in
one go: one after another they would copy the pool many times in a step."""
LEAST_SHARE = 8
"""Room that a full sequence gets in such a go, at least: so many steps pass before the next."""
LEAST_GROWTH = 32
"""Positions that an extent grows by at least."""


@dataclass(frozen=True, slots=True)
class ArenaSize:
    """What one kind of layer has room for."""

    positions: int
    """All sequences together."""
    window: int | None = None
    """A token sees so many positions, itself included; None sees all."""


class Holder(Protocol):
    """A sequence as the pool knows it."""

    extents: list[Extent]
    filled: int
    """Positions that are held, but for those that a window has passed."""
    most: int
    """Positions that it has at its end, at most."""


H = TypeVar("H", bound=Holder)


class PoolMap(Generic[H]):
    """The extents of all sequences, one in each arena."""

    def __init__(self, sizes: Sequence[ArenaSize], *, most_run: int) -> None:
        """`most_run` is the most tokens of one sequence that a step runs."""
        self.arenas = [Arena(size.positions) for size in sizes]
        self.windows = [size.window for size in sizes]
        self.moves: list[Move] = []
        """To be copied in this order before the next step."""
        self.ended: list[H] = []
        """Kept as prefix cache, the one used longest ago first."""
        self._live: list[H] = []
        self._idle = [0] * len(sizes)
        """Positions of each arena that ended sequences occupy."""
        self._most_run = most_run

    @property
    def longest(self) -> int:
        """Positions of the longest sequence that there is room for."""
        rooms = [
            arena.positions
            for arena, window in zip(self.arenas, self.windows, strict=True)
            if window is None or arena.positions < self._span(window)
        ]
        return min(rooms, default=2**62)

    @property
    def used_share(self) -> float:
        """Part of the fullest arena that sequences in flight occupy; may be read from any thread."""
        return max((it.used - idle) / it.positions for it, idle in zip(self.arenas, self._idle, strict=True))

    def place(self, holder: H, tokens: int, *, keep: H | None = None) -> bool:
        """Give `holder` an extent for `tokens` positions in each arena; False where there is no room.

        Ended sequences make room, but not `keep`.
        """
        needs = [self._capacity(tokens, kind) for kind in range(len(self.arenas))]
        if not self._evict(needs, keep=keep):
            return False
        holder.extents = [self._allocate(kind, capacity, keep) for kind, capacity in enumerate(needs)]
        self._live.append(holder)
        return True

    def take_over(self, holder: H, ended: H) -> None:
        """Give `holder` the extents of an ended sequence, which is no longer one."""
        self.ended.remove(ended)
        self._count_idle(ended, -1)
        holder.extents, ended.extents = ended.extents, []
        self._live.append(holder)

    def could_place(self, tokens: int) -> bool:
        """Whether there is room for a sequence of `tokens` positions if every ended one makes room."""
        return all(
            arena.free + idle >= self._capacity(tokens, kind)
            for kind, (arena, idle) in enumerate(zip(self.arenas, self._idle, strict=True))
        )

    def widen(self, holder: H, tokens: int) -> bool:
        """Give `holder` the room that `place` would have given it; False where there is none."""
        for kind, extent in enumerate(holder.extents):
            needed = self._capacity(tokens - extent.base, kind)
            if extent.capacity < needed and not self._grow(holder, kind, needed, needed):
                return False
        return True

    def reserve(self, holder: H, count: int) -> bool:
        """Have room for `count` positions after those that `holder` has filled; False where there is none.

        An extent grows beyond that, for fewer moves, as far as `holder` may need it.
        """
        return all(self._reserve(holder, kind, holder.filled + count) for kind in range(len(self.arenas)))

    def end(self, holder: H) -> None:
        """Keep what `holder` has filled, at least one position, as prefix cache until the room is needed."""
        self._live.remove(holder)
        self.ended.append(holder)
        for kind, extent in enumerate(holder.extents):
            self.arenas[kind].resize(extent, min(extent.capacity, holder.filled - extent.base))
        self._count_idle(holder, 1)

    def touch(self, ended: H) -> None:
        """Note that an ended sequence was of use."""
        self.ended.remove(ended)
        self.ended.append(ended)

    def drop(self, holder: H) -> None:
        """Free the extents of a sequence, in flight or ended."""
        if holder in self.ended:
            self.ended.remove(holder)
            self._count_idle(holder, -1)
        else:
            self._live.remove(holder)
        for arena, extent in zip(self.arenas, holder.extents, strict=True):
            arena.release(extent)
        holder.extents = []

    def holds(self, holder: H, prefix: int) -> bool:
        """Whether a sequence could continue after the first `prefix` positions of `holder`."""
        return bool(holder.extents) and all(
            window is None or extent.base <= max(0, prefix - window + 1)
            for extent, window in zip(holder.extents, self.windows, strict=True)
        )

    def copy(self, source: H, target: H, prefix: int) -> None:
        """Have the first `prefix` positions of `source` in `target` too, which has the same first ones."""
        for kind, window in enumerate(self.windows):
            old, new = source.extents[kind], target.extents[kind]
            first = target.filled if window is None else old.base
            if window is not None and prefix - first > new.capacity:
                first = max(0, prefix - window + 1)
            if window is not None:
                new.base = first
            self.moves.append(
                Move(kind, old.start + first - old.base, new.start + first - new.base, prefix - first)
            )

    def _capacity(self, tokens: int, kind: int) -> int:
        """Return the capacity of an extent for a sequence of `tokens` positions."""
        window = self.windows[kind]
        return tokens if window is None else min(tokens, self._span(window))

    def _span(self, window: int) -> int:
        """Return the capacity of an extent that a window moves through."""
        return window_span(window, self._most_run)

    def _evict(self, needs: Iterable[int], *, keep: H | None = None) -> bool:
        """Drop ended sequences until every arena has room for its part of `needs`; False where none would."""
        needs = list(needs)
        spare = [holder for holder in self.ended if holder is not keep]
        for kind, arena in enumerate(self.arenas):
            if arena.free + sum(it.extents[kind].capacity for it in spare) < needs[kind]:
                return False
        for holder in spare:
            if all(arena.free >= need for arena, need in zip(self.arenas, needs, strict=True)):
                break
            self.drop(holder)
        return True

    def _allocate(self, kind: int, capacity: int, keep: H | None) -> Extent:
        """Return a new extent; there must be as much room in all gaps together.

        An ended sequence, but for `keep`, is rather lost than more moved than the new one may hold.
        """
        arena = self.arenas[kind]
        while (extent := arena.allocate(capacity)) is None:
            spare = next((each for each in self.ended if each is not keep), None)
            moved = arena.gather(capacity, most=None if spare is None else capacity)
            if moved is not None:
                self._note(kind, moved)
            elif spare is not None:
                self.drop(spare)
        return extent

    def _reserve(self, holder: H, kind: int, end: int) -> bool:
        extent, window = holder.extents[kind], self.windows[kind]
        if end - extent.base <= extent.capacity:
            return True
        if window is not None and extent.capacity >= self._span(window):
            first = max(0, holder.filled - window + 1)
            source = extent.start + first - extent.base
            self.moves.append(Move(kind, source, extent.start, holder.filled - first))
            extent.base = first
            return True
        grown = extent.base + extent.capacity + max(LEAST_GROWTH, extent.capacity // GROWTH)
        wanted = max(end, min(grown, holder.most))
        sizes = [self._capacity(tokens - extent.base, kind) for tokens in (end, wanted)]
        # a window that does not reach so far is moved then
        return self._grow(holder, kind, *sizes) and self._reserve(holder, kind, end)

    def _grow(self, holder: H, kind: int, least: int, wanted: int) -> bool:
        """Give a sequence an extent of `wanted` positions, or of `least` or more: in place, or by moves."""
        arena, old = self.arenas[kind], holder.extents[kind]
        if (room := old.capacity + arena.room_behind(old)) >= least:
            arena.resize(old, min(wanted, room))
            return True
        new = arena.allocate(wanted) if self._free(kind, wanted) else None
        if new is None:
            return self._grow_all(holder, kind, least)
        holder.extents[kind], new.base = new, old.base
        self.moves.append(Move(kind, old.start, new.start, holder.filled - old.base))
        arena.release(old)
        return True

    def _grow_all(self, holder: H, kind: int, least: int) -> bool:
        """Give a sequence an extent of `least` positions, and others more room too, by moving each once.

        False where there is not enough for all those that have no room left.
        """
        arena = self.arenas[kind]
        needs = {
            each: self._further(each, kind, share=LEAST_SHARE) if self._further(each, kind, share=1) else 0
            for each in self._live
        }
        needs[holder] = least - holder.extents[kind].capacity
        wanted = {each: max(need, self._further(each, kind)) for each, need in needs.items()}
        if not self._free(kind, sum(needs.values())):
            return False
        self._free(kind, min(sum(wanted.values()), arena.free + self._idle[kind]))
        spare = arena.free - sum(needs.values())
        for left, each in zip(range(len(needs), 0, -1), sorted(needs, key=wanted.__getitem__), strict=True):
            further = min(wanted[each] - needs[each], spare // left)
            needs[each], spare = needs[each] + further, spare - further
        self._note(kind, arena.rearrange({each.extents[kind]: more for each, more in needs.items() if more}))
        return True

    def _further(self, holder: H, kind: int, *, share: int | None = None) -> int:
        """Return how many positions more would leave a sequence `share` unused, if it may need them."""
        extent = holder.extents[kind]
        share = share or max(LEAST_GROWTH, extent.capacity // CROWDED_GROWTH)
        unused = extent.capacity - (holder.filled - extent.base)
        most = self._capacity(holder.most - extent.base, kind)
        return max(0, min(share - unused, most - extent.capacity))

    def _free(self, kind: int, positions: int) -> bool:
        """Drop ended sequences until `positions` of an arena are free; False where they would not be."""
        return self._evict([positions if each == kind else 0 for each in range(len(self.arenas))])

    def _count_idle(self, holder: H, sign: int) -> None:
        for kind, extent in enumerate(holder.extents):
            self._idle[kind] += sign * extent.capacity

    def _note(self, kind: int, moved: list[tuple[Extent, int]]) -> None:
        """Collect the moves of extents that have new starts."""
        held = {
            id(holder.extents[kind]): holder.filled - holder.extents[kind].base
            for holder in (*self._live, *self.ended)
            if holder.extents
        }
        for extent, source in moved:
            count = min(extent.capacity, held.get(id(extent), 0))
            if count > 0:
                self.moves.append(Move(kind, source, extent.start, count))
