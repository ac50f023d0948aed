"""What is said between renderer.py and host.py, and the limits that they keep.

A copy of the host is sent a template, then jobs: JSON of `turns`, `variables`, `continues`, `marked` and
`most`, the text's characters at most. Each has one reply, which begins with its kind. Start at `dumped`.
"""

import json
from typing import Any

CPU_S = 1.0
"""Processor time for one conversation, or for compiling. Public templates render 10,000 messages in 0.2 s."""
WALL_S = 30.0
"""The same on the clock: on a machine with other work."""
MEMORY_BYTES = 512 << 20
"""For one template and what it renders."""
TEXT, MARKED, REFUSED, LONG, BROKEN = b"T", b"M", b"R", b"L", b"B"
"""How a reply begins: a text; JSON of a text and its blocks; why not; nothing; where it is no template."""
ENCODING = "utf-8", "surrogatepass"
MOST_SAID = 400
"""Characters of what a template raises."""


def dumped(job: dict[str, Any]) -> bytes:
    """Return a job as it is sent: what JSON has not is named by its type, as transformers does."""
    written = json.dumps(job, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>")
    return written.encode(*ENCODING)


def reply_bytes(most: int) -> int:
    """Return how many bytes a reply of `most` characters may have; JSON has up to twelve for one."""
    return 12 * most + (1 << 20)
