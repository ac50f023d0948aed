"""What Kubernetes takes as a name, a label or a quantity: its API server's rules, told before it is asked.

Pure text; the rules are those of k8s.io/apimachinery (util/validation, api/resource). Placeholders of
examples pass: they are warned of elsewhere. Start at `subdomain`.
"""

import re
from collections.abc import Mapping
from typing import Any

from runtime.config import describe, nearest
from runtime.errors import ConfigError
from runtime.quantities import QUANTITY
from runtime.workspace.layers import find_placeholders

LONGEST_LABEL = 63
LONGEST_SUBDOMAIN = 253
LARGEST_ANNOTATIONS = 256 << 10
"""Bytes of all annotations of one object together."""
LARGEST_CONFIG_MAP = 1 << 20
"""Bytes of all data of one ConfigMap."""

_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_QUALIFIED = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?")
_SECRET_KEY = re.compile(r"[-._A-Za-z0-9]{1,253}")

_VOLUMES = (
    "awsElasticBlockStore azureDisk azureFile cephfs cinder configMap csi downwardAPI emptyDir ephemeral fc "
    "flexVolume flocker gcePersistentDisk gitRepo glusterfs hostPath image iscsi nfs persistentVolumeClaim "
    "photonPersistentDisk portworxVolume projected quobyte rbd scaleIO secret storageos vsphereVolume"
)
VOLUMES = frozenset(_VOLUMES.split())
"""Kinds of volumes."""
READ_ONLY_VOLUMES = frozenset({"configMap", "downwardAPI", "image", "projected", "secret"})
"""Kinds of volumes that a container cannot write to."""
_VOLUME_KEYS = {
    "emptyDir": {"medium", "sizeLimit"},
    "hostPath": {"path", "type"},
    "nfs": {"server", "path", "readOnly"},
    "persistentVolumeClaim": {"claimName", "readOnly"},
}
"""All keys of the kinds that people write by hand."""


def label(value: str, what: str) -> None:
    """Refuse what is no DNS label (RFC 1123), as of a namespace."""
    expected = f"at most {LONGEST_LABEL} lower-case letters, digits and '-', no '-' at its ends"
    _need(re.fullmatch(_LABEL, value) and len(value) <= LONGEST_LABEL, value, what, expected)


def service(value: str, what: str, *, room: int = 0) -> None:
    """Refuse what is no name of a Service (RFC 1035), with `room` characters to be added to it."""
    longest = LONGEST_LABEL - room
    fits = re.fullmatch(rf"(?![0-9]){_LABEL}", value) and len(value) <= longest
    expected = f"at most {longest} lower-case letters, digits and '-', a letter first, no '-' last"
    _need(fits, value, what, expected)


def subdomain(value: str, what: str, *, longest: int = LONGEST_SUBDOMAIN) -> None:
    """Refuse what is no DNS subdomain (RFC 1123), as of a ConfigMap, a Secret, a claim or a node."""
    expected = f"at most {longest} lower-case letters, digits, '-' and '.', a letter or digit beside each '.'"
    _need(_SUBDOMAIN.fullmatch(value) and len(value) <= longest, value, what, expected)


def label_key(value: str, what: str) -> None:
    """Refuse what is no key of a label or an annotation: NAME, or SUBDOMAIN/NAME."""
    prefix, slash, name = value.rpartition("/")
    right = _QUALIFIED.fullmatch(name) and len(name) <= LONGEST_LABEL
    if slash:
        right = right and _SUBDOMAIN.fullmatch(prefix) and len(prefix) <= LONGEST_SUBDOMAIN
    _need(right, value, what, "NAME or PREFIX/NAME, as in apps or node.kubernetes.io/instance-type")


def label_value(value: str, what: str) -> None:
    """Refuse what is no value of a label."""
    right = not value or (_QUALIFIED.fullmatch(value) and len(value) <= LONGEST_LABEL)
    expected = f"at most {LONGEST_LABEL} letters, digits, '-', '_' and '.', a letter or digit at both ends"
    _need(right, value, what, expected)


def labels(values: Mapping[str, str], what: str) -> None:
    """Refuse labels with a wrong key or value."""
    for key, value in values.items():
        label_key(key, what)
        label_value(value, f"{what} {key}")


def annotations(values: Mapping[str, str], what: str) -> None:
    """Refuse annotations with a wrong key, and too many bytes of them."""
    for key in values:
        label_key(key.lower(), what)
    size = sum(len(key.encode()) + len(value.encode()) for key, value in values.items())
    if size > LARGEST_ANNOTATIONS:
        raise ConfigError(f"{what} are {size} bytes, expected at most {LARGEST_ANNOTATIONS}")


def secret_key(value: str, what: str) -> None:
    """Refuse what is no key in a Secret or ConfigMap."""
    _need(_SECRET_KEY.fullmatch(value), value, what, "letters, digits, '-', '_' and '.'")


def quantity(value: object, what: str) -> None:
    """Refuse what is no quantity, such as 500m, 2 or 16Gi."""
    right = isinstance(value, int | float | str) and not isinstance(value, bool)
    _need(right and QUANTITY.fullmatch(str(value)), value, what, "a quantity such as 500m, 4, 16Gi or 16G")


def sub_path(value: str, what: str) -> None:
    """Refuse a path that leaves its volume."""
    _need(not value.startswith("/") and ".." not in value.split("/"), value, what, "a path below the volume")


def volume(source: Mapping[str, Any], what: str) -> None:
    """Refuse a volume source of no kind, of several, or with a wrong name, path or size in it."""
    kinds = [kind for kind, described in source.items() if described is not None]
    unknown = [kind for kind in kinds if kind not in VOLUMES]
    if unknown:
        raise ConfigError(f"{what}: no volumes of kind {unknown[0]!r}{nearest(unknown[0], VOLUMES)}")
    if len(kinds) != 1 or not isinstance(source[kinds[0]], Mapping):
        found = ", ".join(kinds) or "nothing"
        raise ConfigError(
            f"{what}: expected one kind of volume with its keys, such as emptyDir, found {found}"
        )
    kind, described = kinds[0], source[kinds[0]]
    strange = next((key for key in described if key not in _VOLUME_KEYS.get(kind, described)), None)
    if strange is not None:
        raise ConfigError(
            f"{what}.{kind}: unknown key {strange!r}{nearest(str(strange), _VOLUME_KEYS[kind])}"
        )
    if kind == "persistentVolumeClaim":
        subdomain(str(described.get("claimName") or ""), f"{what}.{kind}.claimName")
    elif kind == "emptyDir" and described.get("sizeLimit") is not None:
        quantity(described["sizeLimit"], f"{what}.{kind}.sizeLimit")
    elif kind == "hostPath":
        path = str(described.get("path") or "")
        _need(
            path.startswith("/") and ".." not in path.split("/"), path, f"{what}.{kind}.path", "a whole path"
        )


def _need(right: object, value: object, what: str, expected: str) -> None:
    if not right and not (isinstance(value, str) and find_placeholders(value)):
        raise ConfigError(f"{what} is {describe(value)}, expected {expected}")
