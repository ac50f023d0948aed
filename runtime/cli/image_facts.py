"""What `runtime inspect` shows of an image: as rows, and as JSON.

Does not fetch anything. Start at `rows`.
"""

from typing import TYPE_CHECKING, Any

from runtime.cli import render
from runtime.oci import ImageInfo

if TYPE_CHECKING:
    from runtime.provenance import Attached


def rows(info: ImageInfo, beside: "Attached") -> list[tuple[str, str]]:
    """Return facts and values: the image's own, then those of what is attached to it."""
    manifest = info.manifest
    own = [("digest", info.digest), ("kind", manifest.kind), ("bytes", str(manifest.size))]
    for number, layer in enumerate(manifest.layers, 1):
        own.append((f"layer {number}", f"{layer.media_type} {layer.digest} {layer.size}"))
    return [*own, *sorted(manifest.annotations.items()), *_attached(beside)]


def _attached(beside: "Attached") -> list[tuple[str, str]]:
    """Return the rows on signatures, statements and bills of materials."""
    rows = [(f"signature {number}", state) for number, state in enumerate(beside.signatures, 1)]
    rows = rows or [("signature", "none")]
    for number, found in enumerate(beside.statements, 1):
        rows.append((f"statement {number}", found.state))
        rows += [(f"  {name}", render.cell(value, whole=True)) for name, value in found.facts.items()]
    for number, bom in enumerate(beside.boms, 1):
        components = bom.get("components")
        count = len(components) if isinstance(components, list) else 0
        rows.append(
            (f"bill of materials {number}", f"CycloneDX {bom.get('specVersion')}, {count} components")
        )
    return rows + [("attached", other) for other in beside.others]


def as_json(info: ImageInfo, beside: "Attached") -> dict[str, Any]:
    """Return the same as JSON, statements and bills whole."""
    manifest = info.manifest
    layers = [layer.as_json() for layer in manifest.layers]
    facts = {"reference": str(info.reference), "digest": info.digest, "kind": manifest.kind}
    attached = {
        "signatures": list(beside.signatures),
        "statements": [{"state": each.state, "statement": each.document} for each in beside.statements],
        "bills_of_materials": list(beside.boms),
        "other_referrers": list(beside.others),
    }
    return {**facts, "layers": layers, "annotations": manifest.annotations, **attached}
