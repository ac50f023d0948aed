"""What a registry's 401 asks for: the challenges of WWW-Authenticate (RFC 9110, 11.6.1).

Several may stand in one header or in several, in any order. Pure text. Start at `parse`.
"""

import re
from dataclasses import dataclass

_ELEMENT = re.compile(
    r"""(?P<name>[^\s,="]+)\s*=\s*"(?P<quoted>(?:[^"\\]|\\.)*)"  # name="value"
      | (?P<name2>[^\s,="]+)\s*=\s*(?P<bare>[^\s,="]+)           # name=value
      | (?P<word>[^\s,"]+)                                       # a scheme, or data without a name after one
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to log in that a registry offers."""

    scheme: str
    """In lower case: "bearer", "basic", or another one."""
    realm: str = ""
    """For bearer the address of the token server."""
    service: str = ""


def parse(text: str) -> list[Challenge]:
    """Return the usable challenges in `text`, bearer first: a registry that offers tokens prefers them."""
    found: list[tuple[str, dict[str, str]]] = []
    end = 0
    for match in _ELEMENT.finditer(text):
        word = match["word"]
        if word is None:
            if found:
                value = re.sub(r"\\(.)", r"\1", match["quoted"]) if match["name"] else match["bare"]
                found[-1][1].setdefault((match["name"] or match["name2"]).lower(), value)
        elif not found or "," in text[end : match.start()] or found[-1][1]:
            found.append((word.lower(), {}))
        # else: data after a scheme without a comma, as Negotiate has it
        end = match.end()
    challenges = [
        Challenge(scheme, each.get("realm", ""), each.get("service", ""))
        for scheme, each in found
        if scheme in {"bearer", "basic"}
    ]
    return sorted(challenges, key=lambda each: each.scheme, reverse=True)
