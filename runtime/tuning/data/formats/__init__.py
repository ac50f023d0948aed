"""Data files as rows: what format a file is of, and a lazy reader for each.

A row is a mapping, or the DataError of a row that cannot be read. Knows formats, not columns or folders.
Start at table.py; streams.py opens files, json_rows.py, delimited.py and columnar.py read them.
"""

from runtime.tuning.data.formats.streams import COMPRESSED
from runtime.tuning.data.formats.table import (
    FORMATS,
    Row,
    base_name,
    file_format,
    instead,
    is_data,
    kind_of,
    named,
    read,
)

__all__ = [
    "COMPRESSED",
    "FORMATS",
    "Row",
    "base_name",
    "file_format",
    "instead",
    "is_data",
    "kind_of",
    "named",
    "read",
]
