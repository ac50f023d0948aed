"""How much data a job takes: bytes that servers send, and bytes that rows become in memory.

`--max-data-bytes` sets both; without it they follow from the free disk and from the machine's memory. Readers
count as they grow, and check what a file says of itself before they read it. Knows no formats. Start at
`DataLimits.of` and `ByteCount`.
"""

import contextlib
import resource
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime import hardware
from runtime.errors import CapacityError, DataError
from runtime.quantities import show_bytes

FLAG = "--max-data-bytes"

DISK_SHARE = 0.9
"""Part of the free disk that downloads may take."""
MEMORY_SHARE = 0.25
"""Part of the memory for rows: as Python's objects and as token ids they take about twice what is counted."""
ROW_BYTES = 512
"""Counted for each row beside its values: its objects take that much when it holds nothing."""
LARGEST_ROW_BYTES = 16 << 20
"""Of one row. A million tokens of text are about 4 MB; tokenizers take a hundred times what they read."""
DEEPEST_NESTING = 100
"""Of lists and objects inside one another in one row."""
ROOM_SHARE = 0.9
"""Part of the memory beyond which reading ends, whatever a file made of it."""
ROOM_BESIDE_BYTES = 1 << 30
"""What reading may take beside the rows: pages and batches as they are decoded."""


class DataLimitError(DataError):
    """The data is more than the user allows: not the fault of the row at which it shows."""


@dataclass(frozen=True, slots=True)
class ByteLimit:
    """A number of bytes, and where it comes from."""

    most: int
    reason: str
    """As in "the limit that --max-data-bytes sets"."""
    given: bool = False
    """The user has set it: what exceeds it is bad data, rather than more than this machine holds."""


@dataclass(frozen=True, slots=True)
class DataLimits:
    """The limits on all data files of a job together."""

    wire: ByteLimit
    """Bytes as servers send them, and as they lie on disk."""
    unpacked: ByteLimit
    """Bytes of the values that are read, after every decompression, and ROW_BYTES for each row."""

    @classmethod
    def of(cls, max_bytes: int | None, folder: Path, *, processes: int = 1) -> "DataLimits":
        """Return `max_bytes`, else what the disk of `folder` and the memory allow each of `processes`."""
        if max_bytes is not None:
            both = ByteLimit(max_bytes, f"the limit that {FLAG} sets", given=True)
            return cls(both, both)
        folder = folder.absolute()
        existing = next(path for path in (folder, *folder.parents) if path.is_dir())
        memory = hardware.host().memory_bytes
        shared = f", for each of {processes} processes" if processes > 1 else ""
        return cls(
            min(
                ByteLimit(
                    int(shutil.disk_usage(existing).free * DISK_SHARE),
                    f"{DISK_SHARE:.0%} of the free space in {existing}",
                ),
                ByteLimit(memory, "the memory of this machine, into which it would have to go"),
                key=lambda limit: limit.most,
            ),
            ByteLimit(
                int(memory * MEMORY_SHARE / processes), f"{MEMORY_SHARE:.0%} of this machine's memory{shared}"
            ),
        )


class ByteCount:
    """Counts bytes against one limit, over all files of a job; several threads may count.

    Raises DataLimitError when a limit that the user has set is exceeded, CapacityError for one that follows
    from the machine.
    """

    def __init__(self, limit: ByteLimit, verb: str = "unpacks to") -> None:
        self.limit = limit
        self._verb = verb
        """What a file does with its bytes: "unpacks to", "sends"."""
        self._count = 0
        self._lock = threading.Lock()

    def add(self, count: int, where: str) -> None:
        """Count `count` more bytes, of the file `where`."""
        with self._lock:
            self._count += count
            total = self._count
        self._check(total, where)

    def add_rows(self, rows: int, values_bytes: int, where: str) -> None:
        """Count `rows` rows whose values take `values_bytes`; call before they become Python's objects."""
        self.add(rows * ROW_BYTES + values_bytes, where)

    def expect(self, count: int, where: str) -> None:
        """Check, without counting, that `count` more bytes are allowed: what a file's own header says."""
        self._check(self._count + count, where)

    @property
    def left(self) -> int:
        """How many more bytes are allowed."""
        return max(0, self.limit.most - self._count)

    def _check(self, total: int, where: str) -> None:
        most = self.limit.most
        if total <= most:
            return
        kind = DataLimitError if self.limit.given else CapacityError
        raise kind(
            f"{where}: {self._verb} more than {most} bytes ({show_bytes(most)}, all data together), "
            f"{self.limit.reason}; use less data or raise {FLAG}"
        )


@contextlib.contextmanager
def bounded_memory(where: str, limit: ByteLimit, *, processes: int = 1) -> Iterator[None]:
    """Raise CapacityError where reading `where` takes far more memory than `limit` explains.

    A few bytes of a file can stand for gigabytes in one call of a library, before anything is there to count;
    otherwise the machine would end the process without a word. A limit of the operating system's kernel on
    the whole process (RLIMIT_DATA), at which allocations fail, taken back when the block ends.
    """
    share = int(hardware.host().memory_bytes * ROOM_SHARE / processes) - hardware.status_bytes("VmRSS")
    room = min(max(share, ROOM_BESIDE_BYTES), 4 * limit.most + ROOM_BESIDE_BYTES)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = hardware.status_bytes("VmData") + room
    lowest = min((wanted, *(each for each in before if each != resource.RLIM_INFINITY)))
    resource.setrlimit(resource.RLIMIT_DATA, (lowest, before[1]))
    try:
        yield
    except MemoryError:
        raise CapacityError(
            f"{where}: reading it takes more memory than the {show_bytes(room)} that it may take here; it "
            "unpacks to far more than its size, or needs a machine with more"
        ) from None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def check_row(count: int, where: str) -> None:
    """Raise DataError when one row is of `count` bytes and no row may be; check before it is parsed."""
    if count > LARGEST_ROW_BYTES:
        raise DataError(
            f"{where}: has more than {LARGEST_ROW_BYTES} bytes ({show_bytes(LARGEST_ROW_BYTES)}) in one row"
        )
