"""An image's bill of materials, as CycloneDX 1.6: its files, the base model, the data, and what made them.

The Python packages of the job that made the folder are in it with the scope `excluded`: they are no part of
the image. https://cyclonedx.org/docs/1.6/json/. The same facts give the same bytes. Start at `build`.
"""

import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from runtime import __version__
from runtime.provenance.facts import Facts

MEDIA_TYPE = "application/vnd.cyclonedx+json"
MOST_FILES = 2000
"""Files that are listed one by one: who reads it reads it whole."""

_ROOT = "image"


def build(facts: Facts, hashes: Mapping[str, str], *, name: str, digest: str) -> dict[str, Any]:
    """Return the bill of the image `digest`, in the repository `name`, whose files have these `hashes`."""
    listed = dict(sorted(hashes.items())[:MOST_FILES])
    root: dict[str, Any] = {"type": "container", "bom-ref": _ROOT, "name": name, "version": digest}
    if len(listed) < len(hashes):
        left_out = str(len(hashes) - len(listed))
        root["properties"] = [{"name": "workspace-runtime:files-not-listed", "value": left_out}]
    files = [
        {"type": "file", "bom-ref": f"file:{file}", "name": file, "hashes": _hashes(sha256)}
        for file, sha256 in listed.items()
    ]
    inputs = [*_base(facts), *_data(facts)]
    packages = [_package(package, version) for package, version in sorted(facts.packages.items())]
    components = [*files, *inputs, *packages]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"{name}@{digest}")
    tool = {"type": "application", "name": "workspace-runtime", "version": __version__}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"tools": {"components": [tool]}, "component": root},
        "components": components,
        "dependencies": [{"ref": _ROOT, "dependsOn": [each["bom-ref"] for each in (*files, *inputs)]}],
    }


def _base(facts: Facts) -> list[dict[str, Any]]:
    base = facts.base
    if base is None:
        return []
    name = base.repository or base.name or "base model"
    entry: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": "model", "name": name}
    if base.version:
        entry["version"] = base.version
    if base.purl:
        entry["purl"] = base.purl
    if base.weights_sha256:
        entry["hashes"] = _hashes(base.weights_sha256)
    return [entry]


def _data(facts: Facts) -> list[dict[str, Any]]:
    return [
        {
            "type": "data",
            "bom-ref": f"data:{number}",
            "name": file.name,
            "hashes": _hashes(file.sha256),
            "data": [{"type": "dataset", "name": file.name}],
        }
        for number, file in enumerate(facts.data, 1)
    ]


def _package(name: str, version: str) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": f"package:{name}",
        "name": name,
        "version": version,
        "scope": "excluded",
        "purl": f"pkg:pypi/{quote(name.lower().replace('_', '-'), safe='')}@{quote(version, safe='')}",
    }


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]
