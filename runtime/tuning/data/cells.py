"""What one cell of a row, or one field of a message, says: text, nothing, or something else.

Null, NaN and what is absent are the same. Knows no columns. Start at `text`.
"""

import json
import math
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from runtime.config import describe
from runtime.errors import DataError


def present(value: Any) -> bool:
    """Return whether a value is neither null nor NaN, which stands for null in columns of numbers."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def filled(value: Any) -> bool:
    """Return whether a value says anything: it is present, no white space alone, and no empty list."""
    if isinstance(value, str | bytes):
        return bool(value.strip())
    return present(value) and not (isinstance(value, list | tuple | dict) and not value)


def text(value: Any, where: str) -> str:
    """Return a value as text: numbers and booleans as JSON writes them, dates as ISO 8601 does.

    DataError, beginning with `where`, for lists and mappings, and for text that is not Unicode.
    """
    if isinstance(value, str):
        return _unicode(value, where)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is binary and not UTF-8 text (byte {error.start})") from None
    raise DataError(f"{where} is {describe(value)}, expected text{_advice(value)}")


def filled_text(value: Any, where: str) -> str:
    """Return a value as text, as `text` does; DataError when it is white space alone."""
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], Mapping):
        value = value[0]
    found = text(value, where)
    if not found.strip():
        raise DataError(f"{where} is empty text")
    return found


def _advice(value: Any) -> str:
    if isinstance(value, list):
        return f"; of its {len(value)} items each needs a row of its own" if len(value) > 1 else ""
    return " (write it as JSON text if the model shall write JSON)" if isinstance(value, Mapping) else ""


def _unicode(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(
            f"{where} holds {half}, half of a character, at {error.start}: the text was cut inside it"
        ) from None
    return value


def number_or_text(value: Any) -> str | None:
    """Return an id or a name as text; None for what is empty or neither text nor a number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None
