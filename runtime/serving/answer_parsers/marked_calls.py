"""Calls whose name stands outside of the JSON of their arguments, between delimiters of the family's own.

Mistral (`[TOOL_CALLS]`), DeepSeek V3 and V3.1, Kimi K2. Start at `mistral`.
"""

from runtime.serving.answer_parsers.forms import FoundCall, Tools, arguments_text, is_name, json_value
from runtime.serving.answer_parsers.json_calls import values
from runtime.serving.answer_parsers.source import Cursor, Steps

MISTRAL = "[TOOL_CALLS]"
IN_MISTRAL = MISTRAL_ID, MISTRAL_ARGS = "[CALL_ID]", "[ARGS]"
DEEPSEEK = "<｜tool▁calls▁begin｜>"
IN_DEEPSEEK = (
    DEEPSEEK_CALL, DEEPSEEK_SEPARATOR, DEEPSEEK_CALL_END, DEEPSEEK_END,
) = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")  # fmt: skip
KIMI = "<|tool_calls_section_begin|>"
IN_KIMI = (
    KIMI_CALL, KIMI_ARGUMENTS, KIMI_CALL_END, KIMI_END,
) = (
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>",
)  # fmt: skip


def mistral(cursor: Cursor, tools: Tools) -> Steps[list[FoundCall] | None]:
    """Read Mistral's calls: a JSON list (until 2024), or a name, `[ARGS]` and an object (since)."""
    yield from cursor.space()
    if (yield from cursor.peek()) in ("[", "{"):
        start = cursor.at
        (args,) = cursor.source.mark((MISTRAL_ARGS,))
        if not (yield from cursor.literal((args,))):
            return (yield from values(cursor))
        cursor.at = start
        return None
    call_id, args = cursor.source.mark((MISTRAL_ID, MISTRAL_ARGS))
    head, found = yield from cursor.until((call_id, args, "{"))
    if head is None:
        return None
    if found == call_id:
        _, found = yield from cursor.until((args, "{"))
    if found == "{":
        cursor.at -= 1
    name = head.strip()
    arguments = yield from json_arguments(cursor)
    if not is_name(name, tools) or arguments is None:
        return None
    return [FoundCall(name, arguments)]


def json_arguments(cursor: Cursor) -> Steps[str | None]:
    """Read a JSON object, and return its text as it is written here; None where there is none."""
    yield from cursor.space()
    if (yield from cursor.peek()) != "{":
        return None
    text = yield from cursor.bracketed()
    try:
        return arguments_text(json_value(text))
    except ValueError:
        return None


def deepseek(cursor: Cursor, tools: Tools) -> Steps[list[FoundCall] | None]:
    """Read DeepSeek's calls: `function` and the name, then JSON in a fence (V3), or both bare (V3.1)."""
    mark = cursor.source.mark
    begin, separator, end = mark((DEEPSEEK_CALL, DEEPSEEK_SEPARATOR, DEEPSEEK_CALL_END))
    ends = mark((DEEPSEEK_END,))
    found: list[FoundCall] = []
    while True:
        yield from cursor.space()
        if found and (yield from cursor.literal(ends)):
            return found
        after_call = cursor.at
        if not (yield from cursor.literal((begin,))):
            return found or None
        head, _ = yield from cursor.until((separator,))
        name = (head or "").strip()
        if name == "function":
            line, _ = yield from cursor.until(("\n",))
            name = (line or "").strip()
        yield from cursor.space()
        if fenced := (yield from cursor.literal(("```json", "```"))):
            yield from cursor.space()
        arguments = yield from json_arguments(cursor)
        if arguments is None or not name:
            cursor.at = after_call
            return found or None
        yield from cursor.space()
        if fenced and (yield from cursor.literal(("```",))):
            yield from cursor.space()
        yield from cursor.literal((end,))
        found.append(FoundCall(name, arguments))


def kimi(cursor: Cursor, tools: Tools) -> Steps[list[FoundCall] | None]:
    """Read Kimi's calls: `functions.NAME:NUMBER`, then the arguments."""
    mark = cursor.source.mark
    begin, args, end, section = mark((KIMI_CALL, KIMI_ARGUMENTS, KIMI_CALL_END, KIMI_END))
    found: list[FoundCall] = []
    while True:
        yield from cursor.space()
        if found and (yield from cursor.literal((section,))):
            return found
        after_call = cursor.at
        if not (yield from cursor.literal((begin,))):
            return found or None
        head, _ = yield from cursor.until((args,))
        arguments = (yield from json_arguments(cursor)) if head is not None else None
        if head is None or arguments is None:
            cursor.at = after_call
            return found or None
        yield from cursor.space()
        yield from cursor.literal((end,))
        name = head.strip().rpartition(":")[0] or head.strip()
        found.append(FoundCall(name.removeprefix("functions."), arguments))
