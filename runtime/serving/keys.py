"""Who may call: one API key, or those of a file, each with a name, rate limits and rights of its own.

Keys are kept as digests under a secret of the process, never as text, and no message holds one: where the
file is wrong, a message has the entry's name and the line. Does not know HTTP. Start at `KeyRing`.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from runtime.config import Strict, parse, read_text, yaml_documents
from runtime.errors import ConfigError, Failure
from runtime.serving.rate_limits import Budget, Rates

log = logging.getLogger(__name__)

POLL_S = 5.0
"""How often the file is looked at: Kubernetes replaces a mounted Secret without telling anybody."""
FILE_BYTES = 1 << 20
MOST_KEYS = 1000
"""Each is a series in the metrics."""
LEAST_CHARACTERS = 16
SINGLE = "default"
"""Name of the key from the environment, where there is a file beside it."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_KEY = re.compile(r"[!-~]{1,512}")
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
_LINE = re.compile(r": line (\d+) ")


class KeyLimits(Strict):
    """What stands beside a key."""

    requests_per_minute: int | None = Field(None, ge=1, le=10**9)
    tokens_per_minute: int | None = Field(None, ge=1, le=10**12)
    """Prompt and answer together. The answer counts with the most that a request allows, until it is done."""
    admin: bool = False
    """May load and unload adapters."""


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One entry of the file."""

    name: str
    digest: bytes
    limits: KeyLimits


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """Whose key a request carries."""

    name: str = ""
    """Empty for the one key of a server without a file: its users are told apart by address."""
    admin: bool = True
    budget: Budget | None = None


class KeyRing:
    """The keys that are valid now. Used on the event loop only."""

    def __init__(self, single: str | None = None, entries: tuple[KeyEntry, ...] | None = None) -> None:
        """`single` is the key from the environment; `entries` those of a file, None without one."""
        self._secret = secrets.token_bytes(32)
        self._single = digest(single) if single is not None else None
        self._holders: dict[bytes, KeyHolder] = {}
        self._budgets: dict[str, Budget] = {}
        self.replace(entries)

    def holder(self, presented: str) -> KeyHolder | None:
        """Return whose key that is, or None.

        The look-up is by a digest under a secret of this process: how long it takes says nothing of a key.
        """
        return self._holders.get(self._place(digest(presented)))

    def replace(self, entries: tuple[KeyEntry, ...] | None) -> None:
        """Make these the valid keys, at once; names that stay keep what they have used."""
        named = list(entries or ())
        if self._single is not None and entries is not None:
            named.append(KeyEntry(SINGLE, self._single, KeyLimits(admin=True)))
        budgets = {}
        holders = {}
        for entry in named:
            rates = Rates(entry.limits.requests_per_minute, entry.limits.tokens_per_minute)
            budget = budgets[entry.name] = self._budgets.get(entry.name) or Budget(entry.name, rates)
            budget.change(rates)
            holders[self._place(entry.digest)] = KeyHolder(entry.name, entry.limits.admin, budget)
        if self._single is not None and entries is None:
            holders[self._place(self._single)] = KeyHolder()
        self._holders, self._budgets = holders, budgets

    def figures(self) -> Mapping[str, Budget]:
        """Return what each key has used, by name; only keys that are valid now."""
        return self._budgets

    def _place(self, hashed: bytes) -> bytes:
        return hmac.digest(self._secret, hashed, "sha256")


def digest(key: str) -> bytes:
    """Return the SHA-256 of a key's text."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def read(path: Path, *, single: str | None = None) -> tuple[KeyEntry, ...]:
    """Return the entries of a file of keys; ConfigError, which holds no key, where it is wrong.

    `single` is a key that is valid beside them.
    """
    with _problems_as_failures(path):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file, expected one with API keys")
        size = path.stat().st_size
    if size > FILE_BYTES:
        raise ConfigError(f"{path}: has {size} bytes, expected a file of API keys of at most {FILE_BYTES}")
    with _problems_as_failures(path):
        text = read_text(path)
    entries = tuple(_entries(_document(text, path), path))
    if not entries:
        raise ConfigError(f"{path}: holds no API key; expected NAME: KEY in each line")
    if len(entries) > MOST_KEYS:
        raise ConfigError(f"{path}: holds {len(entries)} API keys, expected at most {MOST_KEYS}")
    _check_distinct(entries, path, single)
    return entries


@contextlib.contextmanager
def _problems_as_failures(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


def _document(text: str, path: Path) -> dict[Any, Any]:
    """Return the file's keys and values; what a parser says of it is not repeated, it may quote a key."""
    try:
        documents = yaml_documents(text, str(path))
    except ConfigError as failure:
        said = str(failure).removeprefix(str(path))
        found = _LINE.search(said)
        line = f": line {found[1]}" if found else ""
        twice = re.search(r"key '([A-Za-z0-9._-]{1,63})' is written twice", said)
        why = (
            f"the name '{twice[1]}' is written twice"
            if twice and _NAME.fullmatch(twice[1])
            else "expected NAME: KEY in each line (YAML or JSON); write keys in quotes"
        )
        raise ConfigError(f"{path}{line}: {why}") from None
    if len(documents) > 1:
        raise ConfigError(f"{path}: holds {len(documents)} documents, expected one")
    return documents[0] if documents else {}


def _entries(document: Mapping[Any, Any], path: Path) -> Iterator[KeyEntry]:
    for number, (name, value) in enumerate(document.items(), 1):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: the name of entry {number} is not one: expected up to 63 letters, digits, '.', '_' "
                "and '-', and the key behind the colon"
            )
        yield _entry(name, value, f"{path}: {name}")


def _entry(name: str, value: Any, where: str) -> KeyEntry:
    fields = dict(value) if isinstance(value, dict) else {"key": value}
    if "key" not in fields:
        raise ConfigError(f"{where}: 'key' is missing")
    key = fields.pop("key")
    if not isinstance(key, str):
        raise ConfigError(f"{where}: the key is no text; write it in quotes")
    hashed = _HASHED.fullmatch(key)
    if key.startswith("sha256:") and hashed is None:
        raise ConfigError(f"{where}: the key begins with sha256: and 64 hex digits do not follow")
    if hashed is not None and bytes.fromhex(hashed[1]) == digest(""):
        raise ConfigError(f"{where}: the digest is that of no text; `printf %s KEY | sha256sum` had no KEY")
    if hashed is None and len(key) < LEAST_CHARACTERS:
        raise ConfigError(
            f"{where}: the key has {len(key)} characters, expected {LEAST_CHARACTERS} or more; "
            "`openssl rand -hex 32` makes one"
        )
    if hashed is None and not _KEY.fullmatch(key):
        raise ConfigError(
            f"{where}: the key has more than 512 characters, or others than printable ASCII without spaces"
        )
    limits = parse(KeyLimits, fields, where)
    return KeyEntry(name, bytes.fromhex(hashed[1]) if hashed else digest(key), limits)


def _check_distinct(entries: tuple[KeyEntry, ...], path: Path, single: str | None) -> None:
    names: dict[bytes, str] = {}
    if single is not None:
        names[digest(single)] = SINGLE
        if any(entry.name == SINGLE for entry in entries):
            raise ConfigError(f"{path}: '{SINGLE}' is the name of the key from the environment; rename it")
    for entry in entries:
        if entry.digest in names:
            raise ConfigError(f"{path}: '{names[entry.digest]}' and '{entry.name}' have the same key")
        names[entry.digest] = entry.name


class KeyFile:
    """The file of a ring's keys, and when it is read again."""

    def __init__(self, path: Path, *, single: str | None = None) -> None:
        """Read it; raises as `read` does."""
        self._path = path
        self._single = single
        self._signature = _signature(path)
        self.ring = KeyRing(single, read(path, single=single))
        self.asked = asyncio.Event()
        """Set to have it read again."""
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & stat.S_IROTH:
            log.warning("%s: everybody on this machine can read it (mode %04o)", path, mode)

    async def watch(self) -> None:
        """Read the file again when it has changed, or `asked` is set; a wrong one changes nothing."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self.asked.wait()
            signature = await asyncio.to_thread(_signature, self._path)
            if self.asked.is_set() or signature != self._signature:
                self.asked.clear()
                self._signature = signature
                await self._read_again()

    async def _read_again(self) -> None:
        try:
            entries = await asyncio.to_thread(read, self._path, single=self._single)
        except Failure as failure:
            log.warning("API keys stay as they were: %s", failure)
            return
        before, now = set(self.ring.figures()), {entry.name for entry in entries}
        self.ring.replace(entries)
        changes = {"added": now - before, "removed": before - now - {SINGLE}}
        said = [f"{what} {', '.join(sorted(names))}" for what, names in changes.items() if names]
        log.info("API keys read again: %d in %s", len(entries), "; ".join([str(self._path), *said]))


def _signature(path: Path) -> tuple[int, ...] | None:
    """Return what differs once a file was written or replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
