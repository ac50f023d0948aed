"""Finds the function calls in a model's answer.

Two formats cover the model families served here: `<tool_call>{…}</tool_call>` blocks (Qwen, Hermes,
SmolLM) and an answer that is one JSON object or a list of them (Llama 3, Mistral). Knows text only.
Start at `split`.
"""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from runtime.serving.detokenize import StopScanner

PARSERS = frozenset({"hermes", "llama3_json", "llama4_json", "mistral"})
"""vLLM's names of these formats."""
OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """One call that the model asks for; `arguments` is JSON text."""

    name: str
    arguments: str

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """Return OpenAI's object, with `index` where it is part of a stream."""
        call = {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }
        return call if index is None else {"index": index, **call}


def split(text: str, names: frozenset[str]) -> tuple[str, list[Call]]:
    """Return the answer's text without the calls to functions of these names, and the calls.

    Broken JSON and unknown names stay text: nothing the model wrote is lost.
    """
    if OPEN not in text:
        calls = _calls(text, names)
        return ("", calls) if calls else (text, [])
    content, calls = [], []
    before, *blocks = text.split(OPEN)
    content.append(before)
    for block in blocks:
        inside, _, after = block.partition(CLOSE)
        in_block = _calls(inside, names)
        calls += in_block
        content.append(after if in_block else OPEN + block)
    return "".join(content).strip(), calls


def _calls(text: str, names: frozenset[str]) -> list[Call]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return []
    entries = parsed if isinstance(parsed, list) else [parsed]
    calls = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("name") not in names:
            return []
        arguments = entry.get("arguments", entry.get("parameters", {}))
        as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(Call(entry["name"], as_text))
    return calls


class ToolStream:
    """A streamed answer: text passes until a call may have begun, then the rest is held until the end."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._scanner = StopScanner([OPEN])
        self._held = ""
        self._holding = False
        self._begun = False

    def push(self, text: str) -> str:
        """Return the text that can be sent now."""
        if not self._begun and text.strip():
            self._begun = True
            self._holding = text.lstrip()[0] in "{["
        if self._holding:
            self._held += text
            return ""
        passed, opened = self._scanner.push(text)
        if opened:
            self._holding = True
            self._held = OPEN + self._scanner.after
        return passed

    def finish(self) -> tuple[str, list[Call]]:
        """Return the text still to send, and the calls."""
        return split(self._scanner.flush() + self._held, self._names)
