"""Secrets cut out of text that is logged or shown: credentials in URLs and headers, known token forms.

A backstop: nothing here logs secrets on purpose, but other programs' messages repeat what they were given.
All of it is linear in the text, which may be anybody's. Start at `redact`.
"""

import re

_ADDRESS = re.compile(r"(?:=\"[^\s\"]*\"|='[^\s']*'|[^\s<>\"'])*")
"""What follows `://`, up to white space or the quote that ends it."""
_USERINFO = re.compile(r"[^/?#]*@(?!sha256:)|[^/?#:]*:(?!\d+(?:[/?#]|$))[^?#]*@(?!sha256:)")
"""With a slash in a password that nobody percent-encoded; after a port a slash begins the path."""
_QUERY = re.compile(r"\?[^#]*")
_HEADER = re.compile(
    r"(?P<name>\b(?:proxy-)?authorization\\?[\"']?\s?[:=]\s?\\?[\"']?)(?P<scheme>[A-Za-z][\w-]*\s+)?+"
    r"(?!KEY\b)[^\s\"',]+",
    re.IGNORECASE,
)
_CREDENTIALS = re.compile(
    r"\b(?P<scheme>(?i:Bearer|Basic))\s+(?!\w+=|KEY\b)(?=[a-z._~+/=-]*[A-Z0-9]|\S{20})[A-Za-z0-9._~+/=-]+"
)
_FIELD = re.compile(
    r"(?<![\w/-])(?P<name>[\w-]{2,60})(?P<mark>\\?[\"']?(?:\s?[:=]\s?|%3D))(?!\s|//|KEY\b|\\?[\"']?\[redacted)"
    r"(?P<value>\\?\"[^\"]*\"|'[^']*'|[^\s,;&\"'`<>}\])]+)"
)
_SECRET_NAME = re.compile(
    r"(?:pass(?:word|wd|phrase)|api[-_]?key|(?:secret|private|account|access)[-_]?key|client[-_]?secret"
    r"|(?:access|refresh|(?<![a-z])id|identity|auth|bearer|session|security|hub|hf|registry|sas)[-_]?token"
    r"|(?:amz|goog)-credential|sig|signature)$",
    re.IGNORECASE,
)
"""How names of fields, query parameters, settings and variables end whose values are secrets."""
_SHORT_NAME = re.compile(r"(?:token|secret|pwd)$", re.IGNORECASE)
"""Names of much else too: of a secret as they stand in JSON and queries, with something long behind them."""
_TOKEN = re.compile(
    r"\b(?:hf_(?=[a-z]*[A-Z0-9]|[a-z]{12})[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*"
    r"|gh[opsru]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{12,}|glpat-[\w-]{16,}|AKIA[A-Z0-9]{16}\b|xox[abeoprs]-[\w-]{8,}|dckr_(?:pat|oat)_[\w-]{8,}"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{16,}|npm_[A-Za-z0-9]{20,}|nvapi-[\w-]{16,}"
    r"|SharedAccess(?:Key|Signature)=[^;\s]+)"
)


_RANDOM = re.compile(r"[A-Za-z0-9]{16}|[a-z0-9][A-Z]")
"""In an API key, as in no name of words: 16 characters without a hyphen, or a capital within one."""


def redact(text: str) -> str:
    """Return `text` without URLs' queries and user info, headers' credentials, secret fields, known tokens.

    The whole query is removed: a SAS signature (`sig=`) and an S3 one (`X-Amz-Signature=`) are secrets, and
    the rest of it does not help to debug a download.
    """
    text = _without_secrets_of_urls(text)
    text = _HEADER.sub(_kept, text)
    text = _CREDENTIALS.sub(r"\g<scheme> [redacted]", text)
    text = _FIELD.sub(_field, text)
    return _TOKEN.sub(_token, text)


def _without_secrets_of_urls(text: str) -> str:
    """Return `text` whose URLs have neither user info nor query."""
    scheme, *rest = text.split("://")
    shown = [scheme]
    for part in rest:
        shown.append(_address(part) if shown[-1][-1:].isalnum() else part)
    return "://".join(shown)


def _address(text: str) -> str:
    """Return `text`, which begins with what follows a URL's `://`, without user info and query."""
    found = _ADDRESS.match(text)
    address = found[0] if found else ""
    user = _USERINFO.match(address)
    return _QUERY.sub("", address[user.end() if user else 0 :], count=1) + text[len(address) :]


def _token(found: re.Match[str]) -> str:
    """Return what stands for a token; a name of words behind `sk-` is none."""
    is_name = found[0].startswith("sk-") and not _RANDOM.search(found[0])
    return found[0] if is_name else "[redacted]"


def _kept(found: re.Match[str]) -> str:
    """Return what of a header is shown: its name and scheme."""
    return found["name"] + (found["scheme"] or "") + "[redacted]"


def _field(found: re.Match[str]) -> str:
    """Return a field with its value, or without one that is a secret."""
    name, mark, value = found["name"], found["mark"], found["value"]
    is_message = found.string.endswith("--set ", 0, found.start())  # `--set api_key: a key must not …`
    is_prose = mark[:1] in "\"'" and value[:1] not in "\"'"  # `column 'password': cells are no text`
    is_assigned = '"' in mark or "=" in mark
    is_secret = _SECRET_NAME.search(name) or (
        is_assigned and len(value) >= 10 and _SHORT_NAME.fullmatch(name)
    )
    return name + mark + "[redacted]" if is_secret and not is_message and not is_prose else found[0]
