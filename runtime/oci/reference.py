"""Names of images: `[oci://]registry[:port]/repository[:tag][@digest]`, `oci:DIRECTORY[:tag]` for a layout.

Pure text: touches no disk and no network. Start at `parse`; `is_image` tells a name from a path.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from runtime import addresses
from runtime.errors import ConfigError
from runtime.oci.blobs import is_digest

DEFAULT_TAG = "latest"
_DOCKER_HUB = "docker.io"
_HOST = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9_.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_PART = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LONGEST_TAG = 128
_REGISTRY_SCHEME = "oci://"
_SCHEME = r"oci:|docker://"
_REGISTRY = r"(?:localhost|[^/]*[.:][^/]*)/"
_TAGGED = r":[\w.-]+$"
_IMAGE = re.compile(rf"{_SCHEME}|{_REGISTRY}[^/]|[^/.~][^:]*/[^:/]+{_TAGGED}")
"""A scheme, a registry's host before the first slash, or a tag."""
_IMAGE_AND_NO_REPOSITORY_ID = re.compile(rf"{_SCHEME}|{_REGISTRY}[^@]*(?:{_TAGGED}|@sha256:)")
"""A scheme, or a registry's host with a tag or digest at the end: owners on the hub may have a dot."""
_EXPECTED = "registry/repository:tag, as in myregistry.azurecr.io/adapters/phi-3:0.0.1, or oci:DIRECTORY:tag"


@dataclass(frozen=True, slots=True)
class Reference:
    """One image, in a registry or (when `layout` is set) in an OCI layout on disk."""

    registry: str
    """Host and port as the user means them (`docker.io`, `127.0.0.1:5000`); "" for a layout."""
    repository: str
    """Repository path in the registry; "" for a layout."""
    tag: str | None
    """None when a digest alone names the image, and for the only image of a layout."""
    digest: str | None = None
    """`sha256:…`; it wins over the tag when both are given, as everywhere else."""
    layout: Path | None = None
    """Directory of the OCI layout."""

    def __str__(self) -> str:
        name = f"oci:{self.layout}" if self.layout is not None else f"{self.registry}/{self.repository}"
        return name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    @property
    def selector(self) -> str:
        """The digest, else the tag, "latest" without both: the name under which a manifest is requested."""
        return self.digest or self.tag or DEFAULT_TAG

    def tagged(self, tag: str) -> "Reference":
        """Return the same repository under another tag."""
        return replace(self, tag=tag, digest=None)


def is_path(text: str) -> bool:
    """Whether `text` is written as a path, absolute or from here or the home directory on."""
    return text.startswith(("/", "./", "../", "~"))


def is_image(text: str, *, or_repository_id: bool = False) -> bool:
    """Whether `text` is an image rather than a directory or, with `or_repository_id`, a model on the hub.

    Tells by the text alone: a directory that exists under that name is for the caller to look for first.
    """
    pattern = _IMAGE_AND_NO_REPOSITORY_ID if or_repository_id else _IMAGE
    return not is_path(text) and pattern.match(text) is not None


def with_suffix(text: str, suffix: str) -> str:
    """Return the image name `text` with `suffix` added to its tag ("latest" where it has none).

    A digest is dropped, since the result is another image. A tag that gets too long is cut, and made
    unique by part of its digest. `text` need not be valid: examples hold placeholders.
    """
    scheme = "oci:" if text.startswith("oci:") else ""
    name = text.removeprefix(scheme).partition("@sha256:")[0]
    head, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        head, tag = name, DEFAULT_TAG
    if len(tag) + len(suffix) > _LONGEST_TAG:
        suffix = f"-{hashlib.sha256(tag.encode()).hexdigest()[:8]}{suffix}"
        tag = tag[: _LONGEST_TAG - len(suffix)]
    return f"{scheme}{head}:{tag}{suffix}"


def parse(text: str) -> Reference:
    """Return the reference that `text` names, ConfigError saying which part is wrong otherwise.

    As Docker reads it: without a host it is `docker.io`, without a path there `library/`, without tag
    and digest `latest`. `oci://` before the host, as model servers write it, changes nothing. In `oci:a:b/c`
    the colon belongs to the path; for a directory whose own name ends in `:something`, write the tag too.
    """
    if text.startswith(_REGISTRY_SCHEME):
        if text.startswith(f"{_REGISTRY_SCHEME}/"):
            layout = f"oci:/{text.removeprefix(_REGISTRY_SCHEME).lstrip('/')}"
            raise ConfigError(f"image {text!r}: no host after 'oci://'; for a directory write {layout!r}")
        text = text.removeprefix(_REGISTRY_SCHEME)
    elif text.startswith("oci:"):
        return _parse_layout(text)
    login, at, rest = text.partition("@")
    if at and ":" in login and "/" not in login:
        raise ConfigError(f"image ...@{rest}: a name holds no login; use `docker login` or --auth")
    if text != text.strip() or not text:
        raise ConfigError(f"image {text!r}: expected {_EXPECTED}")
    if "://" in text:
        bare = text.split("://", 1)[1]
        raise ConfigError(f"image {text!r}: write it without the scheme, as {bare!r}")
    name, digest = _split_digest(text)
    name, tag = _split_tag(name, text)
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        registry, repository = first, rest
    else:
        registry, repository = _DOCKER_HUB, name
    registry = {"index.docker.io": _DOCKER_HUB, "registry-1.docker.io": _DOCKER_HUB}.get(registry, registry)
    if registry == _DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    _check_names(text, registry, repository)
    return Reference(registry, repository, tag or (None if digest else DEFAULT_TAG), digest)


def parse_repository(text: str) -> Reference:
    """Return the repository, or the folder of repositories, that `text` names; ConfigError otherwise.

    With its registry's host, without tag and digest: `below` puts names under it.
    """
    expected = (
        f"source {text!r}: expected registry/repository without a tag, as in myregistry.azurecr.io/adapters"
    )
    name = text.removeprefix(_REGISTRY_SCHEME)
    first, _, rest = name.partition("/")
    if (
        name.startswith("oci:")
        or not (set(".:") & set(first) or first == "localhost")
        or set("@:") & set(rest)
    ):
        raise ConfigError(expected)
    return replace(parse(text), tag=None)


def below(source: Reference, name: str) -> Reference | None:
    """Return the image that `NAME[:TAG]` or `:TAG` means under `source`; None where `name` is no such name.

    NAME is a path below the source, without a tag its latest; `:TAG` is a tag of the source itself. The name
    comes from outside: host and path of the source stay what they are, whatever it holds.
    """
    path, colon, tag = name.partition(":")
    if (colon and not _TAG.fullmatch(tag)) or not (path or colon):
        return None
    if path and not all(_PART.fullmatch(part) for part in path.split("/")):
        return None
    repository = f"{source.repository}/{path}" if path else source.repository
    return replace(source, repository=repository, tag=tag or DEFAULT_TAG) if len(repository) <= 255 else None


def _parse_layout(text: str) -> Reference:
    path, digest = text.removeprefix("oci:"), None
    if "@sha256:" in path:
        path, digest = _split_digest(path)
    path, tag = _split_tag(path, text)
    if not path:
        raise ConfigError(
            f"image {text!r}: no directory after 'oci:', expected oci:DIRECTORY or oci:DIRECTORY:tag"
        )
    return Reference("", "", tag, digest, layout=Path(path))


def _split_digest(text: str) -> tuple[str, str | None]:
    name, at, digest = text.rpartition("@")
    if not at:
        return text, None
    if not is_digest(digest):
        raise ConfigError(f"image {text!r}: digest {digest!r} is not sha256: and 64 lower-case hex digits")
    return name, digest


def _split_tag(name: str, text: str) -> tuple[str, str | None]:
    head, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        return name, None
    if not _TAG.fullmatch(tag):
        raise ConfigError(
            f"image {text!r}: tag {tag!r} is not up to 128 letters, digits, '_', '.' and '-',"
            " the first a letter, a digit or '_'"
        )
    return head, tag


def _check_names(text: str, registry: str, repository: str) -> None:
    host, _, port = registry.rpartition(":")
    if not _HOST.fullmatch(registry) or (host and port.isdigit() and not 0 < int(port) < 65536):
        raise ConfigError(
            f"image {text!r}: {registry!r} is not a host name with an optional port; expected {_EXPECTED}"
        )
    bare = registry[: -len(port) - 1] if port.isdigit() and host else registry
    address = addresses.forbidden_literal(bare, named=True)
    if address is not None:
        raise ConfigError(f"image {text!r}: {address} is {addresses.kind(address)}; nothing is sent there")
    if repository != repository.lower():
        written = repository if repository in text else repository.removeprefix("library/")
        lower = text.replace(written, written.lower())
        raise ConfigError(
            f"image {text!r}: registries allow only lower-case repository names, not {written!r};"
            f" for example {lower!r}"
        )
    if not all(_PART.fullmatch(part) for part in repository.split("/")) or len(repository) > 255:
        raise ConfigError(
            f"image {text!r}: repository {repository!r} is not made of lower-case letters, digits and single"
            f" separators (. _ -) between slashes; expected {_EXPECTED}"
        )
