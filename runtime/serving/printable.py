"""Text of models and servers, without what a terminal would obey.

An answer that reaches a terminal as it is can move the cursor, set the clipboard or the title, or show other
text than it holds. Knows control sequences (ECMA-48, 5.4 and 5.6) and Unicode's bidirectional controls,
nothing of HTTP. Start at `Printable`.
"""

import re

_STRING = r"(?:\x1b[PX\]^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]{0,4096}"
"""DCS, SOS, OSC, PM or APC, and its content; ends with the line: one ESC must not hide a whole answer."""
_CONTROL = r"(?:\x1b\[|\x9b)[ -?]{0,64}"
"""CSI and its parameters."""
_SEQUENCE = re.compile(rf"{_STRING}(?:\x07|\x9c|\x1b\\)?|{_CONTROL}[@-~]?|\x1b[ -/]{{0,8}}[0-~]?")
_INCOMPLETE = re.compile(rf"(?:{_STRING}\x1b?|{_CONTROL}|\x1b[ -/]{{0,8}})\Z")
_DROPPED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""C0 but tab and newline, DEL, C1; bidirectional embeddings, overrides and isolates."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class Printable:
    """Removes control sequences from text that arrives in pieces; a sequence may be cut anywhere."""

    def __init__(self) -> None:
        self._rest = ""
        """The beginning of a sequence whose end has not arrived yet."""

    def feed(self, text: str) -> str:
        """Return the printable characters, tabs and newlines up to the end of `text`."""
        text, self._rest = self._rest + text, ""
        if _DROPPED.search(text):
            if incomplete := _INCOMPLETE.search(text):
                text, self._rest = text[: incomplete.start()], incomplete[0]
            text = _DROPPED.sub("", _SEQUENCE.sub("", text))
        return _SURROGATE.sub("\ufffd", text)  # half of a pair cannot be written at all


def printable(text: str) -> str:
    """Return a whole `text` without control sequences."""
    return Printable().feed(text)
