"""Addresses of data files as users write them: `URL` or `URL#sha256=DIGEST`.

Pure text: what is wrong with an address is said before anything starts. Where a name leads is checked when it
is connected to (hops.py). Start at `parse`.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote_plus, urlsplit

from runtime import addresses
from runtime.errors import ConfigError

_DIGEST = re.compile(r"sha-?256[=:]([0-9a-f]*)", re.IGNORECASE)
_HEX_DIGITS = 64
_SIGNATURES: Mapping[frozenset[str], frozenset[str]] = {
    # Azure's shared access signatures
    frozenset({"sig", "sv"}): frozenset({
        "sig", "sv", "ss", "srt", "sr", "sp", "st", "se", "spr", "sip", "si", "sdd", "ses", "scid", "saoid",
        "suoid", "skoid", "sktid", "skt", "ske", "sks", "skv", "rscc", "rscd", "rsce", "rscl", "rsct",
    }),
    # S3 and Google Cloud Storage of version 2, OSS, CloudFront
    frozenset({"signature", "awsaccesskeyid"}): frozenset({"signature", "expires", "awsaccesskeyid"}),
    frozenset({"signature", "googleaccessid"}): frozenset({"signature", "expires", "googleaccessid"}),
    frozenset({"signature", "ossaccesskeyid"}): frozenset({
        "signature", "expires", "ossaccesskeyid", "security-token",
    }),
    frozenset({"signature", "key-pair-id"}): frozenset({"signature", "expires", "key-pair-id", "policy"}),
    frozenset({"x-oss-signature"}): frozenset({
        "x-oss-signature", "x-oss-signature-version", "x-oss-credential", "x-oss-date", "x-oss-expires",
        "x-oss-security-token", "x-oss-additional-headers",
    }),
}  # fmt: skip
"""Fields of a query that a signature adds, by those that it always has: others have such names too."""
_SIGNED_PREFIXES = ("x-amz-", "x-goog-")
"""What S3 and Google Cloud Storage of version 4 add."""
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
        """Digest of the address without its signature: a finished file is recorded with it."""
        return hashlib.sha256(f"{unsigned(self.url)}#{self.sha256}".encode()).hexdigest()


def unsigned(url: str) -> str:
    """Return `url` without password, token and signature, which are renewed while what it leads to stays.

    Those of Azure, S3, Google Cloud Storage, OSS and CloudFront. Every other part of a query stays: it may
    say which file, or which version of it, is meant. So does a user's name: some servers give each their own.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    pairs = [pair for pair in parts.query.split("&") if pair]
    names = [unquote_plus(pair.partition("=")[0]).lower() for pair in pairs]
    added = {name for signs, fields in _SIGNATURES.items() if signs.issubset(names) for name in fields}
    kept = [
        pair
        for name, pair in zip(names, pairs, strict=True)
        if name not in added and not name.startswith(_SIGNED_PREFIXES)
    ]
    login, _, host = parts.netloc.rpartition("@")
    user, has_password, _ = login.partition(":")
    if user and has_password:
        host = f"{user}@{host}"
    return parts._replace(netloc=host, query="&".join(kept)).geturl()


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
