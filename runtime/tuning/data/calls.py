"""Tool calls and tool definitions in every form in which data has them, as OpenAI's chat API writes them.

A call becomes `{"id", "type", "function": {"name", "arguments"}}` with `arguments` an object, which is how
the server gives calls to templates; a tool `{"type": "function", "function": {...}}`. Does not know
messages or rows. Start at `calls` and `tools`.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

from runtime import chat_template
from runtime.config import describe
from runtime.errors import DataError
from runtime.tuning.data import cells, literals

_ARGUMENTS = ("arguments", "args", "input", "parameters")
_MEANINGFUL_NULLS = frozenset({"default", "const", "example"})
"""Keys of a JSON schema whose null is a value."""

Call = dict[str, Any]
Tool = dict[str, Any]


class OpenCalls:
    """Calls that have no result yet, in their order; each step takes the same time however many there are."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, str] = OrderedDict()
        self._ids: defaultdict[str, OrderedDict[str, None]] = defaultdict(OrderedDict)

    def open(self, call: Call) -> None:
        """Add a call, which has an id."""
        number, name = call["id"], call["function"]["name"]
        self.close(number)
        self._names[number] = name
        self._ids[name][number] = None

    def close(self, number: str) -> None:
        """Take out the call with this id, if there is one."""
        name = self._names.pop(number, None)
        if name is not None:
            del self._ids[name][number]

    def first(self, name: str | None) -> str | None:
        """Return the id of the first call of this function, else of the first call; None for none."""
        known = self._ids.get(name) if name is not None else None
        return next(iter(known or self._names), None)


def calls(value: Any, where: str) -> list[Call]:
    """Return the calls that `value` stands for: a list, one call, or JSON text; ids may be "".

    DataError, beginning with `where`, for a call without a name or with arguments that are not JSON.
    """
    value = literals.parse_container(value)
    found = [value] if isinstance(value, Mapping) else value
    if not isinstance(found, list):
        raise DataError(f"{where} is {describe(value)}, expected a list of calls with name and arguments")
    return [_call(item, f"{where} call {number}") for number, item in enumerate(found, start=1)]


def looks_like_calls(value: Any) -> bool:
    """Return whether `value` is a list of objects, or the text of one, each with a name and arguments."""
    found = literals.parse_container(value)
    return (
        isinstance(found, list)
        and bool(found)
        and all(
            isinstance(item, Mapping) and "name" in item and any(name in item for name in _ARGUMENTS)
            for item in found
        )
    )


def _call(value: Any, where: str) -> Call:
    value = literals.parse_container(value)
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {describe(value)}, expected an object with name and arguments")
    function = literals.parse_container(value.get("function"))
    custom = value.get("custom")
    if isinstance(custom, Mapping):
        name: Any = custom.get("name")
        sent: Any = {"input": custom.get("input")}
    else:
        called = function if isinstance(function, Mapping) else value
        name = called.get("name") or (function if isinstance(function, str) else None)
        sent = next((called[key] for key in _ARGUMENTS if called.get(key) is not None), None)
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where} does not name its function (has {', '.join(map(str, value)) or 'nothing'})")
    number = cells.number_or_text(value.get("id"))
    return {
        "id": number or "",
        "type": "function",
        "function": {"name": name, "arguments": _object(sent, where)},
    }


def _object(sent: Any, where: str) -> Mapping[str, Any]:
    """Return a call's arguments as an object; what is no object becomes its `arguments`, as in serving."""
    if isinstance(sent, str):
        sent = literals.parse_container(_value(sent, where))  # some are JSON text of JSON text
    return {} if sent is None else chat_template.call_arguments(sent)


def _value(sent: str, where: str) -> Any:
    if not sent.strip():
        return {}
    try:
        return literals.parse(sent)
    except ValueError:
        raise DataError(f"{where} has arguments {describe(sent)}, expected a JSON object") from None


def tools(value: Any, where: str) -> tuple[Tool, ...]:
    """Return tool definitions, from a list, one definition, or JSON text of either.

    DataError, beginning with `where`, for what is no definition of a function.
    """
    found = literals.parse_container(value)
    if isinstance(found, str) and not found.strip():
        return ()
    found = [found] if isinstance(found, Mapping) else found
    if not isinstance(found, list):
        raise DataError(f"{where} is {describe(value)}, expected a list of tools, or JSON text of one")
    return tuple(_tool(item, f"{where} tool {number}") for number, item in enumerate(found, start=1))


def _tool(value: Any, where: str) -> Tool:
    value = literals.parse_container(value)
    inner = value.get("function") if isinstance(value, Mapping) else None
    function = inner if isinstance(inner, Mapping) else value
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} is {describe(value)}, expected a function with its name and parameters")
    described = {key: item for key, item in function.items() if key != "type" or function is inner}
    if "input_schema" in described:  # Anthropic's name
        described["parameters"] = described.pop("input_schema")
    if isinstance(described.get("parameters"), str):
        described["parameters"] = literals.parse_container(described["parameters"])
    return {"type": "function", "function": _without_nulls(described)}


def _without_nulls(value: Any) -> Any:
    """Return a schema without keys that are null: tables write every key of any tool in each of them."""
    if isinstance(value, Mapping):
        return {
            key: _without_nulls(item)
            for key, item in value.items()
            if item is not None or key in _MEANINGFUL_NULLS
        }
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
