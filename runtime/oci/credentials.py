"""Credentials as Docker, podman and Kubernetes store them, read again at each use.

Reads `config.json` files, mounted secrets and credential helpers; sends nothing. Start at `find`.
"""

import base64
import binascii
import fnmatch
import json
import logging
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.oci.access import Access, default_credential_files

log = logging.getLogger(__name__)

NULL_GUID = "00000000-0000-0000-0000-000000000000"
"""User name under which Azure registries take a refresh token as the password."""
_HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_KEY = "https://index.docker.io/v1/"
_HELPER_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class Credential:
    """One way to log in, and where it was found."""

    user: str
    secret: str = field(repr=False)
    kind: Literal["password", "identity", "token"]
    """"identity" is a refresh token to be exchanged, "token" an access token: never passwords."""
    source: str
    """The file (or helper, or identity) it came from, for messages."""

    @property
    def basic(self) -> str:
        """The Authorization header of HTTP Basic."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()

    def __str__(self) -> str:
        who = f"user {self.user!r}" if self.kind != "token" else "the registry token"
        return f"{who} from {self.source}"


class _UnusableError(Exception):
    """A file or helper that may hold a credential and cannot be used."""


def find(
    registry: str, repository: str, access: Access, *, skipped: list[str] | None = None
) -> Iterator[Credential]:
    """Yield the credentials for a repository, file by file.

    skipped: is given what cannot be used, which is logged, too: it may be why a login fails.
    """
    seen: set[tuple[str, str]] = set()
    for path in _files(default_credential_files() if access.files is None else access.files):
        try:
            found = _from_document(_read(path), registry, repository, path)
        except _UnusableError as error:
            log.warning("%s", error)
            if skipped is not None:
                skipped.append(str(error))
            continue
        if found is not None and (found.user, found.secret) not in seen:
            seen.add((found.user, found.secret))
            yield found


def _files(locations: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the files in `locations`; a folder stands for its config.json and the secrets mounted below."""
    for location in locations:
        try:
            if location.is_file():
                yield location
            elif location.is_dir():
                # Kubernetes mounts a secret as links into a hidden folder: take the links, not the folder.
                names = ("config.json", ".dockerconfigjson", ".dockercfg")
                yield from (location / name for name in names if (location / name).is_file())
                for pattern in ("*.json", "*/*.json", "*/.dockerconfigjson"):
                    for path in sorted(location.glob(pattern)):
                        hidden = path.parent.name.startswith("..") or path == location / "config.json"
                        if path.is_file() and not hidden:
                            yield path
        except OSError as error:
            log.warning("%s: credentials cannot be read (%s)", location, error.strerror)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise _UnusableError(f"{path}: credentials cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise _UnusableError(f"{path}: not JSON, expected a Docker config.json; skipped") from None
    if not isinstance(document, dict):
        raise _UnusableError(f"{path}: not a JSON object, expected a Docker config.json; skipped")
    known = {"auths", "credHelpers", "credsStore"} & document.keys()
    return document if known else {"auths": document}  # a .dockercfg is the inner table alone


def _from_document(document: dict[str, Any], registry: str, repository: str, path: Path) -> Credential | None:
    auths = document["auths"] if isinstance(document.get("auths"), dict) else {}
    keys = [key for key in auths if _matches(key, registry, repository)]
    for key in sorted(keys, key=len, reverse=True):  # the longest name is the most specific
        if isinstance(auths[key], dict) and (found := _from_entry(auths[key], path)):
            return found
    helpers = document.get("credHelpers")
    for key, helper in helpers.items() if isinstance(helpers, dict) else ():
        if _matches(key, registry, repository):
            return _from_helper(str(helper), key, path)
    if document.get("credsStore"):
        server = _HUB_KEY if registry in _HUB_NAMES else registry
        return _from_helper(str(document["credsStore"]), server, path)
    return None


def _matches(key: str, registry: str, repository: str) -> bool:
    """Whether the entry `key` (host, URL, host/path or `*.host`) is about the repository."""
    host, _, path = key.rsplit("://", maxsplit=1)[-1].partition("/")
    path = path.strip("/")
    same = registry in _HUB_NAMES if host in _HUB_NAMES else fnmatch.fnmatchcase(registry, host)
    return same and (path in {"", "v1", "v2"} or f"{repository}/".startswith(f"{path}/"))


def _from_entry(entry: dict[str, Any], path: Path) -> Credential | None:
    user, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if entry.get("auth"):
        decoded = _decode(str(entry["auth"]))
        if decoded is not None:
            user, password = decoded
        elif not (password or entry.get("identitytoken") or entry.get("registrytoken")):
            raise _UnusableError(f"{path}: an 'auth' that is not base64 of user:password; skipped")
        else:
            log.warning("%s: an 'auth' that is not base64 of user:password; its other fields are used", path)
    if entry.get("registrytoken"):
        return Credential("", str(entry["registrytoken"]), "token", str(path))
    if entry.get("identitytoken"):
        return Credential(user or NULL_GUID, str(entry["identitytoken"]), "identity", str(path))
    if not password:
        return None
    return Credential(user, password, _kind(user), str(path))


def _decode(auth: str) -> tuple[str, str] | None:
    """Return user and password of an `auth` field, None when it has none."""
    try:
        user, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return (user, password.strip("\0")) if colon else None


def _from_helper(helper: str, server: str, path: Path) -> Credential | None:
    program = f"docker-credential-{helper}"
    source = f"{program} (named in {path})"
    if "/" in helper:
        raise _UnusableError(f"{path}: credential helper {helper!r} is not a plain name; skipped")
    try:
        ended = subprocess.run(  # noqa: S603 - the user's own configuration names the program
            [program, "get"],
            input=server.encode(),
            capture_output=True,
            timeout=_HELPER_TIMEOUT_S,
            check=True,
        )
        answer = json.loads(ended.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except FileNotFoundError:
        raise _UnusableError(f"credential helper {source} is not installed") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no answer in {_HELPER_TIMEOUT_S} s"
        raise _UnusableError(f"credential helper {source} cannot be run ({reason})") from None
    except (subprocess.SubprocessError, ValueError, KeyError, TypeError, RecursionError):
        # Helpers exit 1 for "no credentials" too, and their output may hold some: say no more.
        raise _UnusableError(f"credential helper {source} has nothing for {server}") from None
    if user == "<token>":
        return Credential(NULL_GUID, secret, "identity", source)
    return Credential(user, secret, _kind(user), source)


def _kind(user: str) -> Literal["password", "identity"]:
    return "identity" if user == NULL_GUID else "password"
