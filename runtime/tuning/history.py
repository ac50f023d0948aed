"""The figures of every logged step, one JSON object a line, in a file that outlives its process.

A run that goes on from a checkpoint does some steps again: each step stands in the file once. Does not
know what figures there are. Start at `History`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.files import write_whole


@dataclass(frozen=True, slots=True)
class History:
    """A JSONL file with a "step" in every line."""

    path: Path

    def keep(self, step: int) -> None:
        """Drop what was written after `step`, and a line that a killed process left half done."""
        if self.path.is_file():
            kept = [entry for entry in self.entries() if entry["step"] <= step] if step else []
            write_whole(self.path, "".join(f"{json.dumps(entry)}\n" for entry in kept))

    def add(self, figures: Mapping[str, Any]) -> None:
        """Append one entry."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(figures, allow_nan=False) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries in order of time; lines that are none are passed over."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                found.append(entry)
        return found
