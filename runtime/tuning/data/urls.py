"""Addresses of data files as users write them: `URL` or `URL#sha256=DIGEST`.

Pure text: what is wrong with an address is said before anything starts. Where a name leads is checked when it
is connected to (hops.py). Start at `parse`.
"""

import hashlib
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from runtime import addresses
from runtime.errors import ConfigError

_DIGEST = re.compile(r"sha-?256[=:]([0-9a-f]*)", re.IGNORECASE)
_HEX_DIGITS = 64
_NOT_IN_A_HOST = re.compile(r"[\s\\%<>{}|^`\x00-\x1f]")


@dataclass(frozen=True, slots=True)
class DataUrl:
    """One address, and the digest that its file must have."""

    url: str
    """Without its fragment."""
    sha256: str | None = None
    """In lower case."""

    @property
    def identity(self) -> str:
        """Digest of the address, which may hold secrets: a finished file is recorded with it."""
        return hashlib.sha256(f"{self.url}#{self.sha256}".encode()).hexdigest()


def parse(text: str) -> DataUrl:
    """Return the address that `text` holds; ConfigError, without its secrets, when it is none to fetch."""
    url, _, fragment = text.partition("#")
    problem = problem_of(url)
    if problem:
        raise ConfigError(f"{shown(url)}: {problem}")
    if not fragment:
        return DataUrl(url)
    match = _DIGEST.fullmatch(fragment)
    expected = f"expected #sha256= and {_HEX_DIGITS} hexadecimal digits, or nothing after the address"
    if match is None:
        raise ConfigError(f"{shown(url)}: what follows '#' is no digest, {expected}")
    if len(match[1]) != _HEX_DIGITS:
        raise ConfigError(f"{shown(url)}: its sha256 has {len(match[1])} digits, {expected}")
    return DataUrl(url, match[1].lower())


def problem_of(url: str) -> str | None:
    """Return why `url` is never fetched, as far as its text tells; None where it may be."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "not a valid address"
    if parts.scheme not in ("http", "https") or not host:
        return "only http and https addresses can be fetched"
    if port == 0 or _NOT_IN_A_HOST.search(host if ":" not in host else "") or "\\" in parts.netloc:
        return "not a valid address"
    found = addresses.forbidden_literal(host)
    return refusal(found) if found else None


def refusal(address: str) -> str:
    """Return why nothing is fetched from a numeric address, or a metadata service's name."""
    return f"leads to {address}, {addresses.kind(address)}; it is never fetched"


def shown(url: str) -> str:
    """Return `url` without user, query and fragment, which may hold secrets."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "a malformed address"
    return f"{parts.scheme}://{host}{port}{parts.path}"
