"""Rows of Parquet, Arrow and Feather files, a batch at a time; a column is converted when it is asked for.

What nobody asks for costs nothing and cannot fail: dates beyond Python's, images, embeddings. pyarrow is
imported when a file is read. Start at `read_parquet`; `ColumnarRow` is a row.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

from runtime.errors import DataError, one_line
from runtime.tuning.data.formats import arrow_values
from runtime.tuning.data.limits import ByteCount

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1000
BATCH_BYTES = 64 << 20
"""About as much of a Parquet file as is decoded at a time, by what the file says of its size."""


def read_parquet(file: IO[bytes], unpacked: ByteCount, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet file; `unpacked` counts what is converted of the file called `name`."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        metadata = parquet.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(row_bytes, 1)))
        for batch in parquet.iter_batches(batch_size=rows):
            yield from _batch_rows(batch, unpacked, name)


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
                yield from _batch_rows(arrow.get_batch(number), unpacked, name)
    else:
        with pa.ipc.open_stream(file) as arrow:
            for batch in arrow:
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
            self._unpacked.add_rows(0, column.nbytes, self._file)
            try:
                self._converted[name] = arrow_values.values(column)
            except Exception:  # of some row: each is converted by itself
                self._converted[name] = None
        values = self._converted[name]
        if values is not None:
            return values[row]
        try:
            return arrow_values.values(column.slice(row, 1))[0]
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
