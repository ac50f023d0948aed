"""What Arrow's values take once they are Python's: a few bytes of a file can stand for gigabytes.

Dictionaries, runs and nulls say a value once for many rows. Knows types, not what the values are for. Start
at `converted_bytes`.
"""

from typing import Any

OBJECT_BYTES = 32
"""Of a value in Python beside its content, with the reference to it."""


def converted_bytes(array: Any) -> int:
    """Return about what the values of a pyarrow array take as Python's objects; rather too much."""
    import pyarrow as pa

    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return converted_bytes(array.storage)
    if pa.types.is_dictionary(kind):
        return _dictionary_bytes(array)
    if pa.types.is_run_end_encoded(kind):
        return len(array) * converted_bytes(array.values)
    if pa.types.is_struct(kind):
        return len(array) * OBJECT_BYTES + sum(map(converted_bytes, array.flatten()))
    if pa.types.is_map(kind):
        return len(array) * OBJECT_BYTES + sum(map(converted_bytes, _entries(array)))
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return len(array) * (OBJECT_BYTES + converted_bytes(array.values))  # views may overlap
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return len(array) * OBJECT_BYTES + converted_bytes(array.flatten())
    if pa.types.is_union(kind):
        children = (converted_bytes(array.field(number)) for number in range(kind.num_fields))
        return len(array) * (OBJECT_BYTES + sum(children))
    return len(array) * OBJECT_BYTES + int(array.nbytes)


def _dictionary_bytes(array: Any) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    values = array.dictionary
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        lengths = pc.take(pc.binary_length(values), array.indices)
        return len(array) * OBJECT_BYTES + (pc.sum(lengths).as_py() or 0)
    return len(array) * converted_bytes(values)


def _entries(array: Any) -> tuple[Any, Any]:
    """Return the keys and items of the rows of a map array, a slice of a longer one perhaps."""
    first, last = array.offsets[0].as_py(), array.offsets[len(array)].as_py()
    return array.keys[first:last], array.items[first:last]
