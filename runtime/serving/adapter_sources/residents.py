"""Which adapters from registries are in memory, who uses them, and which leaves first.

Belongs to the event loop: nothing here waits or locks. Start at `Residents`.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.oci import Reference
from runtime.serving.lifecycle import DIGEST_MARK

SHOWN_DIGEST = 12


@dataclass(slots=True, eq=False)
class Resident:
    """One adapter in memory: a name, and the image that it stood for when it was loaded."""

    name: str
    """As clients write it."""
    reference: Reference
    """Its tag in the registry."""
    digest: str
    """Of what the tag named."""
    checked_at: float
    """When the tag was last looked up, by the sources' clock."""
    leases: int = 0
    """Requests that use it, and that wait for it."""

    @property
    def key(self) -> str:
        """What the engine calls it: a tag that has moved is another adapter."""
        return key_of(self.name, self.digest)


def key_of(name: str, digest: str) -> str:
    """Return what the engine calls the adapter `name` of an image."""
    return f"{name}{DIGEST_MARK}{digest.partition(':')[2][:SHOWN_DIGEST]}"


class Residents:
    """Adapters by name, the least recently used first; those whose tag has moved stay while they are used."""

    def __init__(self) -> None:
        self._current: OrderedDict[str, Resident] = OrderedDict()
        self._replaced: list[Resident] = []

    def __len__(self) -> int:
        return len(self._current) + len(self._replaced)

    def __iter__(self) -> Iterator[Resident]:
        yield from (*self._replaced, *self._current.values())

    def use(self, name: str) -> Resident | None:
        """Return what `name` stands for now, and note that it was used."""
        if name in self._current:
            self._current.move_to_end(name)
        return self.current(name)

    def current(self, name: str) -> Resident | None:
        """Return what `name` stands for now."""
        return self._current.get(name)

    def find(self, key: str) -> Resident | None:
        """Return the adapter that the engine calls `key`."""
        return next((each for each in self if each.key == key), None)

    def put(self, resident: Resident) -> None:
        """Let `resident` be what its name stands for."""
        if resident in self._replaced:  # its tag has moved back
            self._replaced.remove(resident)
        before = self._current.pop(resident.name, None)
        if before is not None and before is not resident:
            self._replaced.append(before)
        self._current[resident.name] = resident

    def withdraw(self, name: str) -> Resident | None:
        """Let `name` stand for nothing; what it stood for stays while it is used."""
        resident = self._current.pop(name, None)
        if resident is not None:
            self._replaced.append(resident)
        return resident

    def is_current(self, resident: Resident) -> bool:
        """Whether new requests for its name get it."""
        return self.current(resident.name) is resident

    def unused(self) -> Resident | None:
        """Return the adapter that leaves first; None where all are in use."""
        return next((each for each in self if not each.leases), None)

    def remove(self, resident: Resident) -> None:
        """Forget an adapter."""
        if self.is_current(resident):
            del self._current[resident.name]
        else:
            self._replaced.remove(resident)
