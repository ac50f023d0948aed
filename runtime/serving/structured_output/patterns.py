"""Regular expressions as JSON Schema means them (ECMA-262), in the words of llguidance's engine.

There `.`, `\\d`, `\\w` and `\\s` are of Unicode, and some characters mean more inside a class. Look-around
and backreferences have no counterpart: llguidance refuses what is left of them. Start at `from_ecma`.
"""

import re

ESCAPES = {
    "d": "[0-9]",
    "D": "[^0-9]",
    "w": "[0-9A-Za-z_]",
    "W": "[^0-9A-Za-z_]",
    "s": r"[\t\n\x0B\x0C\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}]",
    "S": r"[^\t\n\x0B\x0C\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}]",
    "v": r"\x0B",
    "0": r"\x00",
}
"""Of U+FEFF, white space in ECMA-262 and none in Python, neither `\\s` nor `\\S` allows one."""
DOT = r"[^\n\r\x{2028}\x{2029}]"
HEX = "[0-9A-Fa-f]"
ESCAPE = re.compile(
    rf"\\(?:c([A-Za-z])|u([Dd][89ABab]{HEX}{{2}})\\u([Dd][C-Fc-f]{HEX}{{2}})|u({HEX}{{4}})"
    rf"|[uUx]\{{({HEX}+)\}}|([pP]\{{[\w=]+\}}|.))",
    re.DOTALL,
)
"""A control character, a pair of surrogates, a code point, one in braces, a class of Unicode, or another."""
QUANTIFIER = re.compile(r"\{\d+(?:,\d*)?\}")


def from_ecma(pattern: str) -> str:
    """Return `pattern` for llguidance; what has no counterpart stays as it is."""
    out: list[str] = []
    at, in_class = 0, False
    while at < len(pattern):
        character = pattern[at]
        if character == "\\" and (found := ESCAPE.match(pattern, at)):
            out.append(_escape(found))
            at = found.end()
            continue
        if in_class:
            in_class = character != "]"
            out.append("\\" + character if character in "[&~" else character)
        elif character == "[":
            empty = next((word for word in ("[^]", "[]") if pattern.startswith(word, at)), None)
            if empty is not None:
                out.append(r"[\s\S]" if empty == "[^]" else r"[^\s\S]")
                at += len(empty)
                continue
            in_class = True
            out.append(character)
            if pattern.startswith("^", at + 1):
                out.append("^")
                at += 1
        elif character == "{" and not QUANTIFIER.match(pattern, at):
            out.append(r"\{")
        else:
            out.append(DOT if character == "." else character)
        at += 1
    return "".join(out)


def _escape(found: re.Match[str]) -> str:
    control, high, low, unit, point, other = found.groups()
    if control is not None:
        return f"\\x{ord(control.upper()) - 64:02X}"
    if high is not None:
        return f"\\x{{{(int(high, 16) - 0xD800 << 10) + int(low, 16) - 0xDC00 + 0x10000:X}}}"
    if unit is not None or point is not None:
        return f"\\x{{{unit or point}}}"
    if other in ESCAPES:
        return ESCAPES[other]
    # an escaped character that means nothing special is itself
    return other if other in "<>_" or (not other.isascii()) else "\\" + other
