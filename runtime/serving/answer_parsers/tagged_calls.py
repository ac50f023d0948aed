"""Calls whose arguments stand one by one between tags, as plain text: what each is, the tool's schema says.

Qwen3-Coder, Seed-OSS (`<function=…><parameter=…>`), GLM 4.5 (`<arg_key>`), MiniMax M2 (`<invoke name="…">`).
Start at `functions`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from runtime.serving.answer_parsers.argument_schemas import ArgumentSchemas
from runtime.serving.answer_parsers.forms import FoundCall, Read, Schema, Tools, is_name
from runtime.serving.answer_parsers.source import Cursor, Steps

FUNCTION = "<function="
GLM = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>")


def _argument_schema(schema: Schema, name: str) -> Any:
    properties = schema.get("properties")
    return properties.get(name) if isinstance(properties, Mapping) else None


def _call(name: str, arguments: Mapping[str, str], tools: Tools) -> FoundCall:
    schema = tools.get(name, {})
    schemas = ArgumentSchemas(schema)
    values = {key: schemas.typed(text, _argument_schema(schema, key)) for key, text in arguments.items()}
    return FoundCall(name, json.dumps(values, ensure_ascii=False))


def _value(text: str) -> str:
    """Return an argument without the line feed at each end, which belongs to the tags."""
    return text.removeprefix("\n").removesuffix("\n")


def functions(closing: str) -> Read:
    """Return what reads `<function=NAME>`, then `<parameter=NAME>` and values, up to `closing`."""
    return _elements(
        closing,
        call=(FUNCTION, ">", "</function>"),
        argument=("<parameter=", ">", "</parameter>"),
        name_of=str.strip,
    )


def invokes(closing: str) -> Read:
    """Return what reads `<invoke name="F">`, then `<parameter name="X">` and values, up to `closing`."""
    return _elements(
        closing,
        call=("<invoke name=", ">", "</invoke>"),
        argument=("<parameter name=", ">", "</parameter>"),
        name_of=lambda text: text.strip().strip("\"'"),
    )


def _elements(
    closing: str,
    *,
    call: tuple[str, str, str],
    argument: tuple[str, str, str],
    name_of: Callable[[str], str],
) -> Read:
    """Return a reader of elements: how a call and an argument begin, how their names end, how they end."""

    def read(cursor: Cursor, tools: Tools) -> Steps[list[FoundCall] | None]:
        found: list[FoundCall] = []
        begun = cursor.source.text.endswith(
            call[0], cursor.source.at, cursor.at
        )  # the opening was a call's own
        while True:
            if not begun:
                yield from cursor.space()
                begun = bool((yield from cursor.literal((call[0],))))
            if not begun:
                break
            name, _ = yield from cursor.until((call[1],))
            arguments = yield from _arguments(cursor, argument, closing=call[2], name_of=name_of)
            if name is None or arguments is None or not is_name(name_of(name), tools):
                return None
            found.append(_call(name_of(name), arguments, tools))
            begun = False
        yield from cursor.literal(cursor.source.mark((closing,)))
        return found or None

    return read


def _arguments(
    cursor: Cursor, argument: tuple[str, str, str], *, closing: str, name_of: Callable[[str], str]
) -> Steps[dict[str, str] | None]:
    """Read the arguments of a call up to its end, each an element of the form `argument`."""
    arguments: dict[str, str] = {}
    while True:
        yield from cursor.space()
        tag = yield from cursor.literal((argument[0], closing))
        if tag == closing:
            return arguments
        key, _ = yield from cursor.until((argument[1],))
        value, _ = yield from cursor.until((argument[2],))
        if not tag or key is None or value is None:
            return None
        arguments[name_of(key)] = _value(value)


def glm(cursor: Cursor, tools: Tools) -> Steps[list[FoundCall] | None]:
    """Read GLM 4.5's call: the name, then `<arg_key>` and `<arg_value>` in turn, up to `</tool_call>`."""
    tags = cursor.source.mark(("<arg_key>", "</tool_call>"))
    head, tag = yield from cursor.until(tags)
    if head is None or not is_name(head.strip(), tools):
        return None
    arguments: dict[str, str] = {}
    key_end, value_start, value_end = cursor.source.mark(("</arg_key>", "<arg_value>", "</arg_value>"))
    while tag == tags[0]:
        key, _ = yield from cursor.until((key_end,))
        yield from cursor.space()
        if key is None or not (yield from cursor.literal((value_start,))):
            return None
        value, _ = yield from cursor.until((value_end,))
        if value is None:
            return None
        arguments[key.strip()] = value
        yield from cursor.space()
        tag = yield from cursor.literal(tags)
    return [_call(head.strip(), arguments, tools)] if tag else None
