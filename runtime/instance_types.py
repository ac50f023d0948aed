"""Which GPUs the instance types of Azure, AWS and Google Cloud have.

Those that KAITO's controller provisions (kaito-project/kaito, pkg/sku), and GKE's; facts from the clouds'
public size tables. Does not know the GPUs themselves (gpus.py). Start at `find`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from runtime.config import nearest


@dataclass(frozen=True, slots=True)
class InstanceType:
    """One machine of a cloud."""

    name: str
    accelerator: str
    """What it has, in the cloud's words."""
    count: int
    gpu: str | None
    """The kind in gpus.py; None for what this project does not run on."""


_NVIDIA: Mapping[str, Mapping[int, str]] = {
    "V100-16GB": {
        1: "Standard_NC6s_v3 p3.2xlarge",
        2: "Standard_NC12s_v3",
        4: "Standard_NC24s_v3 Standard_NC24rs_v3 p3.8xlarge",
        8: "p3.16xlarge",
    },
    "V100-32GB": {8: "Standard_ND40rs_v2 p3dn.24xlarge"},
    "T4-16GB": {
        1: "Standard_NC4as_T4_v3 Standard_NC8as_T4_v3 Standard_NC16as_T4_v3 g4dn.xlarge g4dn.2xlarge "
        "g4dn.4xlarge g4dn.8xlarge g4dn.16xlarge g5g.xlarge g5g.2xlarge g5g.4xlarge g5g.8xlarge",
        2: "g5g.16xlarge g5g.metal",
        4: "Standard_NC64as_T4_v3 g4dn.12xlarge",
        8: "g4dn.metal",
    },
    "A2-16GB": {1: "Standard_NC4_A2 Standard_NC8_A2", 2: "Standard_NC16_A2 Standard_NC32_A2"},
    "A16-16GB": {1: "Standard_NC4_A16 Standard_NC8_A16", 2: "Standard_NC16_A16 Standard_NC32_A16"},
    "A10-24GB": {
        1: "Standard_NV36ads_A10_v5 Standard_NV36adms_A10_v5",
        2: "Standard_NV72ads_A10_v5",
    },
    "A10G-24GB": {
        1: "g5.xlarge g5.2xlarge g5.4xlarge g5.8xlarge g5.16xlarge",
        4: "g5.12xlarge g5.24xlarge",
        8: "g5.48xlarge",
    },
    "L4-24GB": {
        1: "g6.xlarge g6.2xlarge g6.4xlarge g6.8xlarge g6.16xlarge gr6.4xlarge gr6.8xlarge g2-standard-4 "
        "g2-standard-8 g2-standard-12 g2-standard-16 g2-standard-32",
        2: "g2-standard-24",
        4: "g6.12xlarge g6.24xlarge g2-standard-48",
        8: "g6.48xlarge g2-standard-96",
    },
    "L40S-48GB": {
        1: "g6e.xlarge g6e.2xlarge g6e.4xlarge g6e.8xlarge g6e.16xlarge",
        4: "g6e.12xlarge g6e.24xlarge",
        8: "g6e.48xlarge",
    },
    "RTX-PRO-6000-96GB": {
        1: "g7e.2xlarge g7e.4xlarge g7e.8xlarge g4-standard-48",
        2: "g7e.12xlarge g4-standard-96",
        4: "g7e.24xlarge g4-standard-192",
        8: "g7e.48xlarge g4-standard-384",
    },
    "A100-40GB": {
        1: "a2-highgpu-1g",
        2: "a2-highgpu-2g",
        4: "a2-highgpu-4g",
        8: "Standard_ND96asr_v4 Standard_ND96asr_A100_v4 p4d.24xlarge a2-highgpu-8g",
        16: "a2-megagpu-16g",
    },
    "A100-80GB": {
        1: "Standard_NC24ads_A100_v4 a2-ultragpu-1g",
        2: "Standard_NC48ads_A100_v4 a2-ultragpu-2g",
        4: "Standard_NC96ads_A100_v4 a2-ultragpu-4g",
        8: "Standard_ND96amsr_A100_v4 p4de.24xlarge a2-ultragpu-8g",
    },
    "H100-80GB": {
        1: "p5.4xlarge a3-highgpu-1g",
        2: "a3-highgpu-2g",
        4: "a3-highgpu-4g",
        8: "Standard_ND96isr_H100_v5 p5.48xlarge a3-highgpu-8g a3-megagpu-8g a3-edgegpu-8g",
    },
    "H100-94GB": {1: "Standard_NC40ads_H100_v5 Standard_NCC40ads_H100_v5", 2: "Standard_NC80adis_H100_v5"},
    "H200-141GB": {8: "Standard_ND96isr_H200_v5 p5e.48xlarge p5en.48xlarge a3-ultragpu-8g"},
    "B200-180GB": {8: "p6-b200.48xlarge a4-highgpu-8g"},
    "B300-288GB": {8: "p6-b300.48xlarge"},
    "GB200-186GB": {4: "Standard_ND128isr_NDR_GB200_v6 p6e-gb200.36xlarge a4x-highgpu-4g"},
    "GB300-288GB": {4: "Standard_ND128isr_GB300_v6 a4x-maxgpu-4g-metal"},
}
"""Kind of GPU -> how many -> the instance types."""
_OTHER: Mapping[str, Mapping[int, str]] = {
    "AMD Radeon PRO V620": {1: "Standard_NG32ads_V620_v1 Standard_NG32adms_V620_v1"},
    "AMD Radeon Instinct MI25": {1: "Standard_NV32as_v4"},
    "AMD Instinct MI300X": {8: "Standard_ND96isr_MI300X_v5"},
    "AMD Radeon Pro V520": {
        1: "g4ad.xlarge g4ad.2xlarge g4ad.4xlarge",
        2: "g4ad.8xlarge",
        4: "g4ad.16xlarge",
    },
    "NVIDIA M60 (compute capability 5.2)": {
        1: "Standard_NV6 Standard_NV12s_v3 g3s.xlarge g3s.4xlarge g3.4xlarge",
        2: "Standard_NV12 Standard_NV24s_v3 g3s.8xlarge g3.8xlarge",
        4: "Standard_NV24 Standard_NV48s_v3 g3s.16xlarge g3.16xlarge",
    },
    "NVIDIA K80 (compute capability 3.7)": {1: "p2.xlarge", 8: "p2.8xlarge", 16: "p2.16xlarge"},
    "AWS Trainium": {1: "trn1.2xlarge", 16: "trn1.32xlarge trn1n.32xlarge"},
    "AWS Inferentia2": {1: "inf2.xlarge inf2.8xlarge", 6: "inf2.24xlarge", 12: "inf2.48xlarge"},
}
"""The same for what this project does not run on."""

_WITHOUT_GPU = re.compile(
    r"standard_(?:[abdefhlm]|dc|ec|fx|gs|hb|hc|hx|eb)[a-z]*\d+\w*"  # Azure: series with GPUs begin with N
    r"|(?:a1|[cmrtxzdih]\d\w*(?:-\w+)?|im4gn|is4gen|u\d?-\w+|mac\w*|hpc\w*)\.(?:nano|micro|small|medium|metal|"
    r"\d*x?large)\w*(?:-\w+)?"  # AWS
    r"|(?:e2|n2|n2d|n4|c2|c2d|c3|c3d|c4|c4a|c4d|t2d|t2a|m1|m2|m3|m4|x4|h3|z3|f1|g1)-[\w-]+"  # Google Cloud
)
"""Names of machines without a GPU, in lower case; n1 is none of them, since GPUs are attached to it."""


def find(name: str) -> InstanceType | None:
    """Return the instance type called `name`, in any case; None where it is not known."""
    return _all().get(name.lower())


def canonical(name: str) -> str:
    """Return `name` as the cloud spells it, which labels of nodes do too; as it is where it is not known."""
    found = find(name)
    return found.name if found else name


def has_no_gpu(name: str) -> bool:
    """Whether `name` is a type of a series that has no GPU: Standard_D4s_v5, m5.xlarge, e2-standard-4."""
    return find(name) is None and _WITHOUT_GPU.fullmatch(name.lower()) is not None


def hint(name: str) -> str:
    """Return " (did you mean 'a'?)" with the instance types most like `name`, or ""."""
    return nearest(name, names(), cutoff=0.85)


def names() -> tuple[str, ...]:
    """Return the instance types with GPUs that this project runs on."""
    return tuple(found.name for found in _all().values() if found.gpu is not None)


@cache
def _all() -> dict[str, InstanceType]:
    return {
        name.lower(): InstanceType(name, accelerator, count, accelerator if table is _NVIDIA else None)
        for table in (_NVIDIA, _OTHER)
        for accelerator, counts in table.items()
        for count, listed in counts.items()
        for name in listed.split()
    }
