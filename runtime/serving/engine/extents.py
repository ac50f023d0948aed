"""Where the arenas of the key-value pool hold each sequence: extents, and the room between them.

An arena has the positions of all layers of one kind (kv_pool.py); each sequence has one extent in each arena.
Pure Python over numbers: does not know tensors, tokens or requests. Start at `Extent`.
"""

from dataclasses import dataclass


@dataclass(slots=True)
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
