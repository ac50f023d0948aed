"""Cells of Arrow tables as Python values.

Dates and times become text: Python's own types end at the year 9999 and know fewer time zones. Inside a cell,
where a message has its time, none can fail. What is null inside a cell is absent, since a column of objects
has every key in each of them. Does not know files or rows. Start at `values`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

_OUT_OF_RANGE = "<value out of range"
"""How Arrow begins the text of a date that its calendar has not."""


def values(column: "pa.Array") -> list[Any]:
    """Return the cells of a column.

    Raises pyarrow's errors for data that is damaged, ValueError for a date that no calendar has, for a
    duration, and for an object with a key twice.
    """
    import pyarrow as pa

    if pa.types.is_temporal(column.type):
        return _texts(column)
    for changed in (_without_zones, _as_text):
        wanted = changed(column.type)
        column = column if wanted.equals(column.type) else column.cast(wanted)
    return [_present(value) for value in column.to_pylist(maps_as_pydicts="strict")]


def _texts(times: "pa.Array") -> list[str | None]:
    import pyarrow as pa

    if pa.types.is_duration(times.type):
        raise ValueError("a duration has no usual form as text")
    texts: list[str | None] = times.cast(pa.string()).to_pylist()
    far = next((text for text in texts if text is not None and text.startswith(_OUT_OF_RANGE)), None)
    if far is not None:
        raise ValueError(far.strip("<>"))
    return texts


def _without_zones(kind: "pa.DataType") -> "pa.DataType":
    """Return `kind` with all times in UTC, so that no time zone is looked up."""
    import pyarrow as pa

    return _mapped(kind, lambda leaf: pa.timestamp(leaf.unit) if pa.types.is_timestamp(leaf) else leaf)


def _as_text(kind: "pa.DataType") -> "pa.DataType":
    """Return `kind` with dates and times as text."""
    import pyarrow as pa

    return _mapped(kind, lambda leaf: pa.string() if pa.types.is_temporal(leaf) else leaf)


def _mapped(kind: "pa.DataType", leaf: Callable[[Any], "pa.DataType"]) -> "pa.DataType":
    """Return `kind` with `leaf` applied to the types of its values."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _mapped(kind.value_type, leaf)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_mapped(field.type, leaf)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(kind.key_field.type, kind.item_field.with_type(_mapped(kind.item_type, leaf)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_mapped(kind.value_type, leaf)), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_mapped(kind.value_type, leaf)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_mapped(kind.value_type, leaf)))
    return leaf(kind)


def _present(value: Any) -> Any:
    """Return a cell without what is null inside it."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_present(item) for item in value]
    return None if isinstance(value, str) and value.startswith(_OUT_OF_RANGE) else value
