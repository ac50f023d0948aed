"""Rows of JSON: one object a line, a list, an object that holds the list or the columns, several objects.

The suffix does not decide: `.json` files hold lines and `.jsonl` files lists. Lines are read one by one and a
list item by item, so that memory is that of a row; a single object is read whole. Start at `read_json`.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from runtime.config import describe
from runtime.errors import DataError
from runtime.tuning.data import shapes
from runtime.tuning.data.example import SPEAKERS
from runtime.tuning.data.formats.streams import CHUNK_BYTES, not_utf8, utf8
from runtime.tuning.data.limits import LARGEST_ROW_BYTES, ByteCount, check_row

Row = dict[str, Any]

_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()
_CUT_SHORT = 12
"""Characters from its end within which an error may be due to a text that goes on: `\\ud83d\\ud` is one."""


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        message = error.msg.removesuffix(" at")
        return f"{message} at character {error.pos}"
    if isinstance(error, RecursionError):
        return "lists and objects are nested too deeply"
    return "a number has too many digits" if "digits" in str(error) else str(error)


def read_json(
    file: io.BufferedReader, unpacked: ByteCount, name: str, *, lines: bool
) -> Iterator[Row | DataError]:
    """Yield the rows of a JSON text; `lines`: a text of one line is one row, whatever it holds.

    `unpacked` is asked whether what is parsed at once of the file called `name` may be as large as it is.
    """
    stream, whole = utf8(file), _Whole(unpacked, name)
    start = _first_byte(stream)
    if start == b"[":
        values: Iterator[Any] = _list_items(stream)
    elif start == b"{" or lines or not start:
        values = _objects(stream, whole, lines=lines) if start else iter(())
    else:
        raise DataError("not a JSON file")
    for value in values:
        if isinstance(value, dict | DataError):
            yield value
        else:
            yield DataError(f"is {describe(value)}, expected an object")


def _first_byte(stream: io.BufferedReader) -> bytes:
    """Return the first byte that is no space, which is left in the stream."""
    while start := stream.peek(1):
        if stripped := start.lstrip():
            stream.read(len(start) - len(stripped))
            return stripped[:1]
        stream.read(len(start))
    return b""


@dataclass(frozen=True, slots=True)
class _Whole:
    """Reads a text that has to be parsed as a whole."""

    unpacked: ByteCount
    name: str

    def read(self, begun: bytes, stream: io.BufferedReader) -> bytes:
        """Return `begun` and the rest of the stream; a Failure when its values would take too much memory."""
        data = begun + stream.read()
        counts = ((sign, size, data.count(sign)) for sign, size in _OBJECT_BYTES.items())
        self.unpacked.expect(sum(size * count for _, size, count in counts), self.name)
        return data


_OBJECT_BYTES = {b"{": 72, b"[": 72, b'"': 32, b",": 8}
"""What Python takes at least for a value, by the sign that shows it in a text: `[{},{},…` grows 24 times."""


def _objects(stream: io.BufferedReader, whole: _Whole, *, lines: bool) -> Iterator[Any]:
    """Yield one object a line, or what one object spread over many lines, or several such, hold."""
    first = stream.readline(LARGEST_ROW_BYTES)
    if len(first) == LARGEST_ROW_BYTES and not lines:
        yield from _document(whole.read(first, stream))
        return
    second = _next_line(stream)
    values = _line_values(first)
    if second is None and not lines and len(values) == 1 and isinstance(values[0], dict):
        yield from _rows_of(values[0])
    elif first.rstrip().endswith(_OPEN) and not isinstance(_line_values(second or b"")[0], dict):
        yield from _document(whole.read(first + (second or b""), stream))
    else:
        yield from values
        while second is not None:
            yield from _line_values(second)
            second = _next_line(stream)


_OPEN = (b"{", b"[", b",", b":")
"""Ends of a line after which its object goes on; a broken line ends anywhere."""


def _next_line(stream: io.BufferedReader) -> bytes | None:
    """Return the next line that is not blank; None at the end."""
    while line := stream.readline(LARGEST_ROW_BYTES + 1):
        if line.strip():
            check_row(len(line), "a line")
            return line
    return None


def _line_values(line: bytes) -> list[Any]:
    """Return the value on a line, or the values when several follow one another; a DataError for none."""
    try:
        return list(_values(line.decode().strip("\ufeff\r\n")))  # files that were joined keep their marks
    except UnicodeDecodeError as error:
        return [DataError(not_utf8(error))]
    except (ValueError, RecursionError) as error:
        return [DataError(f"is not valid JSON: {_reason(error)}")]


def _values(text: str) -> Iterator[Any]:
    """Yield the values of `text`, which follow one another, at least one."""
    position, end = 0, len(text.rstrip(_SPACE))
    while not position or position < end:
        while position < end and text[position] in _SPACE:
            position += 1
        value, position = _DECODER.raw_decode(text, position)
        yield value


def _document(data: bytes) -> Iterator[Any]:
    """Yield the rows of a text whose values are spread over many lines."""
    try:
        values = list(_values(data.decode()))
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(error)) from None
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg} (line {error.lineno})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {_reason(error)}") from None
    if len(values) == 1 and isinstance(values[0], dict):
        yield from _rows_of(values[0])
    else:
        yield from values


def _rows_of(value: dict[str, Any]) -> Iterator[Any]:
    """Yield the rows in a file's only object: its list of them, its columns, or the object itself."""
    lists = {name: item for name, item in value.items() if _is_rows(item)}
    if len(lists) > 1 and len(lists.keys() & _ROWS) == 1:
        lists = {name: item for name, item in lists.items() if name in _ROWS}
    names, cells = value.get("columns"), value.get("data")
    if not value or _is_row(value):
        yield value
    elif len(lists) > 1:
        raise DataError(f"holds {len(lists)} lists of objects ({', '.join(lists)}), expected one: the rows")
    elif lists:
        yield from next(iter(lists.values()))
    elif isinstance(names, list) and isinstance(cells, list):  # pandas: orient="split"
        yield from (_named(names, row) for row in cells)
    elif all(isinstance(item, list) for item in value.values()):
        yield from _columns(value)
    elif all(isinstance(item, dict) and _is_index(item) for item in value.values()):  # pandas' default
        yield from _columns({name: list(column.values()) for name, column in value.items()})
    elif _is_keyed(value):  # pandas: orient="index"
        yield from value.values()
    elif _is_labelled(value):
        raise DataError(
            f"holds an object in each column ({', '.join(value)}), as pandas writes an index of texts; "
            "expected rows: to_json(orient='records', lines=True)"
        )
    else:
        yield value


def _is_keyed(value: dict[str, Any]) -> bool:
    """Return whether an object holds rows by numbers or ids, rather than being a row of objects."""
    if not all(isinstance(item, dict) for item in value.values()):
        return False
    return _is_index(value) or (all(map(_is_row, value.values())) and not _has_text_column(value))


def _is_labelled(value: dict[str, Any]) -> bool:
    """Return whether an object holds columns whose cells have the same names in each."""
    items = list(value.values())
    same = all(isinstance(item, dict) and item.keys() == items[0].keys() for item in items)
    return same and len(items[0]) > 1 and _has_text_column(value) and not _is_row(items[0])


def _has_text_column(value: dict[str, Any]) -> bool:
    return any(name.lower() in _TEXT_COLUMNS for name in value)


_ROWS = frozenset(("data", "rows"))
"""Names of the rows among several lists of objects."""
_TEXT_COLUMNS = frozenset((shapes.TEXT, *(pair.question for pair in shapes.PAIRS), *shapes.ANSWERS))
"""With text under one of these names an object is a row itself, whatever lists it has besides."""


def _is_row(value: dict[str, Any]) -> bool:
    """Return whether an object is a row: it has text of its own, or a conversation."""
    return any(
        _is_conversation(item) or (isinstance(item, str) and name.lower() in _TEXT_COLUMNS)
        for name, item in value.items()
    )


def _is_conversation(value: Any) -> bool:
    """Return whether `value` is a list of messages, which is one row's."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return any(key.lower() in SPEAKERS for key in value[0])


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _is_index(value: dict[str, Any]) -> bool:
    return bool(value) and all(re.fullmatch(r"-?\d+", key) for key in value)


def _named(names: list[Any], cells: Any) -> Any:
    if not isinstance(cells, list) or len(cells) != len(names):
        return DataError(f"is {describe(cells)}, expected {len(names)} values")
    return {str(name): cell for name, cell in zip(names, cells, strict=True)}


def _columns(by_name: dict[str, list[Any]]) -> Iterator[Row]:
    lengths = {name: len(column) for name, column in by_name.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"holds columns of different lengths ({found})")
    for cells in zip(*by_name.values(), strict=True):
        yield dict(zip(by_name, cells, strict=True))


def _list_items(stream: io.BufferedReader) -> Iterator[Any]:
    """Yield the items of a list, or of several lists after one another, as they are read."""
    text = _GrowingText(stream)
    while text.next_character() == "[":
        text.take()
        count = 0
        while text.next_character() != "]":
            if count and text.next_character() != ",":
                yield text.skip(
                    DataError(f"is not valid JSON: {text.next_character()!r}, expected ',' or ']'")
                )
                continue
            if count:
                text.take()
            count += 1
            try:
                value = text.value()
            except DataError as error:
                value = text.skip(error)
            yield value
        text.take()
    if text.next_character():
        raise DataError(f"not valid JSON: {text.next_character()!r} after the end of the list")


_MARKS = re.compile(r'["\\\[\]{},]')
"""What tells, in an item that is no JSON, where it ends."""


class _GrowingText:
    """A text of which as much is read as its next value needs."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._position, self._ended = "", 0, False

    def _read_more(self) -> None:
        self._text = self._text[self._position :]
        self._position = 0
        data = self._stream.read(max(CHUNK_BYTES, len(self._text)))
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise DataError(not_utf8(error)) from None
        self._ended = not data

    def next_character(self) -> str:
        """Return the next character that is no space, which stays the next; "" at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in _SPACE:
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            self._read_more()

    def take(self) -> None:
        """Go past the next character."""
        self.next_character()
        self._position += 1

    def skip(self, error: DataError) -> DataError:
        """Go to the comma or bracket that ends the item of a list, and return `error`, which it has.

        `error` is raised where no such end is found: a brace or a quote without its other half hides it.
        """
        braces, brackets, quoted, escaped, gone = 0, 0, False, 0, 0
        while gone <= LARGEST_ROW_BYTES and self.next_character():
            beyond = self._position + escaped
            for mark in _MARKS.finditer(self._text, beyond):
                at, sign = mark.start(), mark[0]
                if at < beyond:
                    continue
                if sign == "\\":
                    beyond = at + 2 if quoted else at
                elif sign == '"':
                    quoted = not quoted
                elif quoted:
                    continue
                elif sign in ",]" and not braces and not brackets:
                    self._position = at
                    return error
                elif sign in "{}":
                    braces = max(0, braces + (1 if sign == "{" else -1))
                    brackets = brackets if braces else 0  # what an object left open ends with it
                elif sign in "[]":
                    brackets = max(0, brackets + (1 if sign == "[" else -1))
            gone += len(self._text) - self._position
            escaped, self._position = max(0, beyond - len(self._text)), len(self._text)
        raise error

    def value(self) -> Any:
        """Return the next value; DataError when it is none."""
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _CUT_SHORT
                if self._ended or not goes_on:
                    raise DataError(f"is not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"is not valid JSON: {_reason(error)}") from None
            else:
                if end < len(self._text) or self._ended:  # a number at the end may go on
                    self._position = end
                    return value
            check_row(len(self._text) - self._position, "an item of the list")
            self._read_more()
