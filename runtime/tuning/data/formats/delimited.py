"""Rows of CSV and its relatives: separated by commas, semicolons, tabs or bars, whichever the header has.

Strict about quotes and the number of columns: an unquoted line break or separator would otherwise shift text
into other columns without a word. Start at `read_delimited`.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator

from runtime.errors import DataError
from runtime.tuning.data.formats.streams import CHUNK_BYTES, utf8
from runtime.tuning.data.limits import LARGEST_ROW_BYTES

SEPARATORS = ",;\t|"
_MOST_HEADER_LINES = 100
_MOST_BLANK_LINES = 100_000

_ESCAPED_QUOTE = re.compile(rb'\\"[^\s,;\t|"]')
"""A quote inside a quoted cell that Spark has escaped; RFC 4180 doubles it, and has none before a letter."""
_ESCAPED = re.compile(r'\\["\\]|"')


def read_delimited(file: io.BufferedReader) -> Iterator[dict[str, str] | DataError]:
    """Yield the rows below the header, every cell as text."""
    stream = utf8(file)
    spark = _ESCAPED_QUOTE.search(stream.peek(CHUNK_BYTES)) is not None
    csv.field_size_limit(LARGEST_ROW_BYTES)  # the process's: 128 KiB is less than an answer may have
    with io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        lines = _Lines(text)
        header = lines.header()
        if not header:
            return
        separator = _separator(header)
        spaced = header.count(separator) == len(re.findall(rf"{re.escape(separator)} ", header)) > 0
        if spark:
            lines.unescape(separator)
        names = _names(next(csv.reader([header], delimiter=separator, skipinitialspace=spaced), []))
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=spaced, strict=True)
        blank = 0
        while True:
            began = reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if lines.ended and "unexpected end" in str(error):
                    raise DataError(
                        f"a quote that is opened below line {began + lines.header_lines} is never closed"
                    ) from None
                yield DataError(f"is not valid CSV: {error} (lines {_range(lines, began, reader.line_num)})")
                continue
            if cells:
                yield _row(names, cells)
            blank = 0 if cells else blank + 1
            if blank > _MOST_BLANK_LINES:
                raise DataError(f"has more than {_MOST_BLANK_LINES} blank lines after one another")


def _range(lines: "_Lines", began: int, ended: int) -> str:
    return f"{began + lines.header_lines + 1} to {ended + lines.header_lines}"


class _Lines:
    """The lines of a text, with its quotes doubled as RFC 4180 does it."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._separator = ""
        self._quoted = False
        self.header_lines = 0
        self.ended = False

    def unescape(self, separator: str) -> None:
        """Read what is left of the text as Spark writes it: a backslash before quotes and backslashes."""
        self._separator = separator

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(LARGEST_ROW_BYTES)
        if not line:
            self.ended = True
            raise StopIteration
        return _ESCAPED.sub(self._unescaped, line) if self._separator else line

    def _unescaped(self, found: re.Match[str]) -> str:
        mark, line = found[0], found.string
        if mark != '"':
            return {'\\"': '""', "\\\\": "\\"}[mark] if self._quoted else mark
        begins = found.start() == 0 or line[found.start() - 1] == self._separator
        self._quoted = begins if not self._quoted else False
        return mark

    def header(self) -> str:
        """Return the first line that is not blank, with those that a quoted name goes on in; or ""."""
        header = ""
        for line in self:
            self.header_lines += 1
            header += line if header or line.strip() else ""
            if header and header.count('"') % 2 == 0:
                if not re.fullmatch(r"sep=.\s*", header):  # Excel's
                    return header.rstrip("\r\n")
                header = ""
            if self.header_lines > _MOST_HEADER_LINES:
                break
        if header:
            raise DataError(
                "its header, the line with the names of columns, has a quote that is never closed"
            )
        return ""


def _separator(header: str) -> str:
    """Return the separator that makes the most columns of the header; a comma where there is one column."""
    counts = {}
    for separator in SEPARATORS:
        try:
            counts[separator] = len(next(csv.reader([header], delimiter=separator), []))
        except csv.Error:
            counts[separator] = 0
    return max(SEPARATORS, key=lambda separator: counts[separator])


def _names(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise DataError(f"has two columns '{twice[0]}', so which one is meant cannot be told")
    return names


def _row(names: list[str], cells: list[str]) -> dict[str, str] | DataError:
    if len(cells) > len(names) and not any(cells[len(names) :]):  # separators at the end of every line
        cells = cells[: len(names)]
    if len(cells) != len(names):
        return DataError(
            f"does not have {len(names)} columns as the header has, but {len(cells)} "
            "(an unquoted line break or separator in a text?)"
        )
    if [cell.strip() for cell in cells] == names:
        return DataError("is the header again: files have been joined with theirs")
    for name, cell in zip(names, cells, strict=True):
        if "\0" in cell:
            return DataError(f"column '{name}' has a NUL byte: the file is damaged, or not in UTF-8")
    return dict(zip(names, cells, strict=True))
