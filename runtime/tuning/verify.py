"""Whether a fetched file is what its name says, before anything reads rows of it. Start at `verify`."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from runtime.errors import DataError


def verify(path: Path, what: str, *, sha256: str | None = None) -> None:
    """Raise DataError, and remove `path`, unless it is a whole data file; `what` names it in the message."""
    try:
        _check(path, what, sha256)
    except DataError:
        path.unlink(missing_ok=True)
        raise


def _check(path: Path, what: str, sha256: str | None) -> None:
    if not path.exists() or not path.stat().st_size:
        raise DataError(f"{what}: the file is empty")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        start = stream.read(64)
    if sha256 is not None and digest != sha256:
        raise DataError(f"{what}: sha256 is {digest}, expected {sha256}")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        raise DataError(
            f"{what}: not data but a web page (a login or an error page?); it starts with {start!r}"
        )
    name = path.name.removesuffix(".part").lower()
    if ".parquet" not in name and not start.startswith(b"PAR1"):
        return
    if not start.startswith(b"PAR1"):
        raise DataError(f"{what}: not a parquet file; it starts with {start[:40]!r}")
    try:
        with pa.parquet.ParquetFile(path) as file:
            rows = file.metadata.num_rows
    except (pa.ArrowInvalid, OSError):
        raise DataError(
            f"{what}: a damaged or incomplete parquet file of {path.stat().st_size} bytes"
        ) from None
    if not rows:
        raise DataError(f"{what}: a parquet file without rows")
