"""What of a Workspace or its configuration is a secret: whoever may list objects reads a ConfigMap too.

Tells by names of keys and by forms: logins and signatures in addresses, tokens that are known. Errs on the
side of secrecy, since a Secret holds what a ConfigMap does. Start at `places`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from runtime.redaction import redact

_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)
_CHOOSES = (
    "alt api-version branch config dl download export format lang limit offset page raw ref rev revision "
    "split v version"
)
_HARMLESS = frozenset(_CHOOSES.split())
"""Parameters of addresses that choose what is read; any other may prove who reads it."""
_KEY = re.compile(
    r"(?:^|.*[_.])(?:api_?keys?|(?:access|account|private|secret|shared|encryption|storage)_?key|passw(?:or)?d"
    r"|passphrase|credentials?|client_?secret|connection_?string|sas|sas_?token|signature)"
    r"|(?:.*_)?(?:access|api|auth|bearer|hf|hub|id|refresh|registry|session|wandb)_?token|token|secret"
)
"""Names of keys whose text is a secret, in snake case."""


def places(value: Any, where: str = "") -> Iterator[str]:
    """Yield the dotted place of every secret in `value`, which stands at `where`."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            here = f"{where}.{key}" if where else str(key)
            if _KEY.fullmatch(_snake(str(key))) and _is_text(each):
                yield here
            else:
                yield from places(each, here)
    elif isinstance(value, list | tuple):
        yield from dict.fromkeys(place for each in value for place in places(each, where))
    elif isinstance(value, str) and is_secret(value):
        yield where


def is_secret(text: str) -> bool:
    """Whether `text` holds a login, a signed address, a known form of token, or JSON with a secret in it."""
    if any(_proves_who_reads(address) for address in _ADDRESS.findall(text)):
        return True
    rest = _ADDRESS.sub("", text)
    return redact(rest) != rest or any(places(_json(text)))


def _proves_who_reads(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        return True
    named = {name.lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    return "@" in parts.netloc or not named <= _HARMLESS


def _json(text: str) -> Any:
    """Return the object or list that `text` is, as flags take them; None where it is none."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_text(value: Any) -> bool:
    each = value if isinstance(value, list) and value else [value]
    return all(isinstance(it, str | int | float) and not isinstance(it, bool) and it != "" for it in each)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
