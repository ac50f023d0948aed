"""What one message says: its content is a text, a list of parts, or a tool's result of any shape.

Does not know who speaks to whom, nor rows. Start at `content`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.config import describe
from runtime.errors import DataError
from runtime.tuning.data import calls, cells
from runtime.tuning.data.calls import Call

_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking", "reasoning_text", "summary_text")
_PARTS = {*_TEXT_PARTS, *_REASONING_PARTS, "refusal", "tool_use", "tool_result"}
_TEXTS = ("text", "thinking", "reasoning", "refusal", "content", "value")
"""Names under which a part holds its text, the first that is there."""


@dataclass(slots=True)
class Content:
    """What a message says, does and thinks."""

    text: str = ""
    thoughts: str = ""
    calls: list[Call] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    """Results of tools that a user's message carries: content and tool_call_id."""
    missing: bool = False
    """Whether there was no content at all."""


def content(value: Any, role: str, where: str) -> Content:
    """Return what `value`, the content of a message of `role`, says.

    DataError, beginning with `where`, for images, audio and video, and for what is no text.
    """
    if value is None:
        return Content(missing=True)
    if isinstance(value, Mapping) and _is_part(value):
        value = [value]
    if isinstance(value, list | tuple) and (role != "tool" or all(map(_is_part, value))):
        return _joined(value, where)
    if role in ("tool", "calling") and isinstance(value, Mapping | list):
        return Content(json.dumps(value, ensure_ascii=False, default=str))
    return Content(cells.text(value, f"{where} content"))


def _is_part(value: Any) -> bool:
    """Return whether a value within a tool's result is a part of a message rather than data."""
    if not isinstance(value, Mapping):
        return isinstance(value, str)
    kind = value.get("type")
    return (
        kind in _PARTS
        or _is_medium(kind)
        or (kind is None and {name for name in value if value[name] is not None} == {"text"})
    )


def _is_medium(kind: Any) -> bool:
    return isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video", "file"))


def _joined(parts: list[Any] | tuple[Any, ...], where: str) -> Content:
    said = Content()
    for number, part in enumerate(parts, start=1):
        if part is not None:
            _add_part(said, part, f"{where} part {number}")
    return said


def _add_part(said: Content, part: Any, where: str) -> None:
    if isinstance(part, str):
        said.text += cells.text(part, where)
        return
    if not isinstance(part, Mapping):
        raise DataError(f"{where} is {describe(part)}, expected an object with type and text")
    kind = part.get("type") or "text"
    if kind == "tool_use":
        said.calls += calls.calls([part], where)
    elif kind == "tool_result":
        result = content(part.get("content"), "tool", where)
        number = cells.number_or_text(part.get("tool_use_id"))
        said.results.append({"content": result.text} | ({"tool_call_id": number} if number else {}))
    elif kind in _REASONING_PARTS:
        said.thoughts += _text(part, where)
    elif kind in _TEXT_PARTS or kind == "refusal":
        said.text += _text(part, where)
    else:
        known = ", ".join(sorted(_PARTS))
        only = "only text is trained on" if _is_medium(kind) else f"expected one of {known}"
        raise DataError(f"{where} is of type {describe(kind)}, which is not supported: {only}")


def _text(part: Mapping[str, Any], where: str) -> str:
    found = next((part[name] for name in _TEXTS if part.get(name) is not None), None)
    if found is None:
        raise DataError(f"{where} has no text")
    return cells.text(found, where)
