"""Rows of Parquet, Arrow and Feather files, a batch at a time; a column is converted when it is asked for.

What nobody asks for costs nothing and cannot fail: dates beyond Python's, images, embeddings. pyarrow is
imported when a file is read. Start at `read_parquet`; `ColumnarRow` is a row.
"""

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

from runtime.errors import DataError, one_line
from runtime.quantities import show_bytes
from runtime.tuning.data.formats import arrow_values
from runtime.tuning.data.formats.arrow_sizes import converted_bytes
from runtime.tuning.data.limits import LARGEST_ROW_BYTES, ROW_BYTES, ByteCount, check_row

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1000
BATCH_BYTES = 64 << 20
"""About as much of a Parquet file as is decoded at a time, by what the file says of its size."""
LARGEST_DECODED_ROW = 256 << 20
"""Of one row of a Parquet file, with the columns that nobody asks for: images, films."""
_LEAST_VALUE_BYTES = 5
"""A value of one byte, and its levels."""


def read_parquet(file: IO[bytes], unpacked: ByteCount, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet file; `unpacked` counts what is converted of the file called `name`."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        unpacked.expect(parquet.metadata.num_rows * ROW_BYTES, name)
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(_row_bytes(parquet.metadata), 1)))
        for batch in parquet.iter_batches(batch_size=rows):
            yield from _batch_rows(batch, unpacked, name)


def cut_short(file: IO[bytes]) -> str:
    """Return what is wrong with a Parquet file that lacks its end, "" for one that has it."""
    start, size = file.read(4), file.seek(0, io.SEEK_END)
    file.seek(max(size - 4, 0))
    end = file.read(4)
    file.seek(0)
    if start != b"PAR1" or (end == b"PAR1" and size > 8):
        return ""
    return (
        f"a Parquet file that is cut short: after {size:,} bytes its end is missing, without which no row is "
        "found; copy or download it again"
    )


def _row_bytes(metadata: Any) -> int:
    """Return what a row of a Parquet file takes when it is decoded, on average in the group with the largest.

    DataError where that is more than any row may: by its bytes, and by its values, which a dictionary or a
    run stands for in a few.
    """
    largest = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        values = sum(group.column(column).num_values for column in range(group.num_columns))
        largest = max(
            largest, max(group.total_byte_size, values * _LEAST_VALUE_BYTES) // max(group.num_rows, 1)
        )
    if largest > LARGEST_DECODED_ROW:
        raise DataError(
            f"its rows take {show_bytes(largest)} each on average, expected at most "
            f"{show_bytes(LARGEST_DECODED_ROW)}; leave out columns that no row needs"
        )
    return largest


def read_arrow(file: IO[bytes], unpacked: ByteCount, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of an Arrow file or stream, or of a Feather file; see `read_parquet`."""
    import pyarrow as pa
    import pyarrow.ipc

    start = file.read(6)
    file.seek(0)
    if start.startswith(b"FEA1"):
        raise DataError("a Feather file of version 1, which pyarrow is giving up: write it as version 2")
    if start == b"ARROW1":
        with pa.ipc.open_file(file) as arrow:
            for number in range(arrow.num_record_batches):
                yield from _checked_rows(arrow.get_batch(number), unpacked, name)
    else:
        with pa.ipc.open_stream(file) as arrow:
            for batch in arrow:
                yield from _checked_rows(batch, unpacked, name)


def _checked_rows(batch: "pa.RecordBatch", unpacked: ByteCount, name: str) -> Iterator["ColumnarRow"]:
    """Yield the rows of a batch as it lay in a file, where its length may be made up."""
    unpacked.expect(batch.num_rows * ROW_BYTES, name)
    yield from _batch_rows(batch, unpacked, name)


def _batch_rows(batch: "pa.RecordBatch", unpacked: ByteCount, name: str) -> Iterator["ColumnarRow"]:
    """Yield the rows of a batch, in slices, so that what is converted at a time stays small."""
    for start in range(0, batch.num_rows, BATCH_ROWS):
        columns = _Columns(batch.slice(start, BATCH_ROWS), unpacked, name)
        for number in range(columns.rows):
            yield ColumnarRow(columns, number)


class _Columns:
    """The columns of a batch, converted on demand."""

    def __init__(self, batch: "pa.RecordBatch", unpacked: ByteCount, file: str) -> None:
        self._unpacked, self._file = unpacked, file
        self.rows: int = batch.num_rows
        self.names: dict[str, int] = {name: number for number, name in enumerate(batch.schema.names)}
        self._counts = Counter(batch.schema.names)
        self._batch = batch
        self._converted: dict[str, list[Any] | None] = {}

    def cell(self, name: str, row: int) -> Any:
        """Return a value as Python has it; DataError, naming the column, when it cannot be one."""
        if name not in self.names:
            raise KeyError(name)
        if self._counts[name] > 1:
            raise DataError(f"column '{name}' is there twice, so which one is meant cannot be told")
        column = self._batch.column(self.names[name])
        if name not in self._converted:
            self._check(name, column)
            self._converted[name] = self._convert(column)
        values = self._converted[name]
        if values is not None:
            return values[row]
        check_row(converted_bytes(column.slice(row, 1)), f"column '{name}'")
        try:
            return arrow_values.values(column.slice(row, 1))[0]
        except MemoryError:
            raise
        except Exception as error:  # pyarrow's own, OverflowError, KeyError, ImportError, …
            raise DataError(
                f"column '{name}' ({column.type}) cannot be read: {one_line(error, 100)}"
            ) from None

    def _check(self, name: str, column: "pa.Array") -> None:
        """Raise DataError for offsets that lead out of a damaged file: pyarrow would follow them."""
        try:
            column.validate(full=True)
        except Exception as error:
            raise DataError(f"column '{name}' is damaged: {one_line(error, 100)}") from None

    def _convert(self, column: "pa.Array") -> list[Any] | None:
        """Return the cells of a column; None where each has to be converted by itself."""
        size = converted_bytes(column)
        self._unpacked.add(size, self._file)
        if size > LARGEST_ROW_BYTES:  # one of them, perhaps
            return None
        try:
            return arrow_values.values(column)
        except MemoryError:
            raise
        except Exception:  # of some row
            return None


class ColumnarRow(Mapping[str, Any]):
    """One row of a batch; a cell is converted when it is asked for."""

    __slots__ = ("_columns", "_row")

    def __init__(self, columns: _Columns, row: int) -> None:
        self._columns, self._row = columns, row

    def __getitem__(self, name: str) -> Any:
        return self._columns.cell(name, self._row)

    def __contains__(self, name: object) -> bool:
        return name in self._columns.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.names)

    def __len__(self) -> int:
        return len(self._columns.names)
