"""Which GPUs the instance type of a Workspace (resource.instanceType) has.

Lists the Azure VM sizes that KAITO provisions; for any other, `runtime plan` takes --gpu. Start at `gpus_of`.
"""

from pathlib import Path

from runtime.workspace.manifest import read

_GPUS: dict[str, tuple[str, int]] = {
    "standard_nc6s_v3": ("V100-16GB", 1),
    "standard_nc12s_v3": ("V100-16GB", 2),
    "standard_nc24s_v3": ("V100-16GB", 4),
    "standard_nc24rs_v3": ("V100-16GB", 4),
    "standard_nd40rs_v2": ("V100-32GB", 8),
    "standard_nc4as_t4_v3": ("T4-16GB", 1),
    "standard_nc8as_t4_v3": ("T4-16GB", 1),
    "standard_nc16as_t4_v3": ("T4-16GB", 1),
    "standard_nc64as_t4_v3": ("T4-16GB", 4),
    "standard_nv36ads_a10_v5": ("A10-24GB", 1),
    "standard_nv36adms_a10_v5": ("A10-24GB", 1),
    "standard_nv72ads_a10_v5": ("A10-24GB", 2),
    "standard_nc24ads_a100_v4": ("A100-80GB", 1),
    "standard_nc48ads_a100_v4": ("A100-80GB", 2),
    "standard_nc96ads_a100_v4": ("A100-80GB", 4),
    "standard_nd96asr_v4": ("A100-40GB", 8),
    "standard_nd96amsr_a100_v4": ("A100-80GB", 8),
    "standard_nc40ads_h100_v5": ("H100-94GB", 1),
    "standard_nc80adis_h100_v5": ("H100-94GB", 2),
    "standard_nd96isr_h100_v5": ("H100-80GB", 8),
    "standard_nd96isr_h200_v5": ("H200-141GB", 8),
}


def gpus_of(manifest: Path) -> tuple[str, int] | None:
    """Return the kind and number of GPUs of the instance type in `manifest`; None when it is not known."""
    workspace = read(manifest).workspace
    return _GPUS.get(workspace.resource.instance_type.lower())
