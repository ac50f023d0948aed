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
    kind: Literal["password", "identity"]
    """"identity" is a refresh token to be exchanged, never sent as a password."""
    source: str
    """The file (or helper, or identity) it came from, for messages."""

    @property
    def basic(self) -> str:
        """The Authorization header of HTTP Basic."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()

    def __str__(self) -> str:
        return f"user {self.user!r} from {self.source}"


def find(registry: str, repository: str, access: Access) -> Iterator[Credential]:
    """Yield the credentials for a repository, file by file; unreadable files are logged and skipped."""
    seen: set[tuple[str, str]] = set()
    for path in _files(default_credential_files() if access.files is None else access.files):
        document = _read(path)
        if document is None:
            continue
        found = _from_document(document, registry, repository, path)
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


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        log.warning("%s: credentials cannot be read (%s)", path, error.strerror)
        return None
    except ValueError:
        log.warning("%s: not JSON, expected a Docker config.json; skipped", path)
        return None
    if not isinstance(document, dict):
        log.warning("%s: not a JSON object, expected a Docker config.json; skipped", path)
        return None
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
        try:
            user, _, password = base64.b64decode(str(entry["auth"])).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            log.warning("%s: an 'auth' that is not base64 of user:password; skipped", path)
            return None
    if entry.get("identitytoken"):
        return Credential(user or NULL_GUID, str(entry["identitytoken"]), "identity", str(path))
    if not password.strip("\0"):
        return None
    return Credential(user, password, _kind(user), str(path))


def _from_helper(helper: str, server: str, path: Path) -> Credential | None:
    program = f"docker-credential-{helper}"
    if "/" in helper:
        log.warning("%s: credential helper %r is not a plain name; skipped", path, helper)
        return None
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
        log.warning("%s: credential helper %s is not installed", path, program)
        return None
    except (subprocess.SubprocessError, ValueError, KeyError, TypeError):
        # Helpers exit 1 for "no credentials" too, and their output may hold some: say no more.
        log.info("%s: credential helper %s has nothing for %s", path, program, server)
        return None
    source = f"{program} (named in {path})"
    if user == "<token>":
        return Credential(NULL_GUID, secret, "identity", source)
    return Credential(user, secret, _kind(user), source)


def _kind(user: str) -> Literal["password", "identity"]:
    return "identity" if user == NULL_GUID else "password"
