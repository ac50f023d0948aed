"""GPUs that a plan can be made for without having one: by their name, a cloud's instance type, or a size.

Knows what NVIDIA's driver reports of each kind. What this machine has is asked of its driver instead
(hardware.py), which machines of a cloud have which GPUs stands in instance_types.py. Start at `named`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from runtime import instance_types
from runtime.config import nearest
from runtime.errors import ConfigError
from runtime.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of GPU."""

    name: str
    capability: tuple[int, int]
    """CUDA compute capability."""
    mebibytes: int
    """Memory, about as the driver reports it, its own part and error correction taken off."""
    rented: bool = True
    """Clouds have it: it may be proposed to somebody whose job does not fit."""


_KINDS = (
    Kind("A2-16GB", (8, 6), 15356, rented=False),
    Kind("A16-16GB", (8, 6), 15356, rented=False),
    Kind("T4-16GB", (7, 5), 15360),
    Kind("V100-16GB", (7, 0), 16160),
    Kind("V100-32GB", (7, 0), 32510),
    Kind("A10-24GB", (8, 6), 23028),
    Kind("A10G-24GB", (8, 6), 23028),
    Kind("L4-24GB", (8, 9), 23034),
    Kind("A30-24GB", (8, 0), 24258, rented=False),
    Kind("A100-40GB", (8, 0), 40536),
    Kind("L40-48GB", (8, 9), 46068, rented=False),
    Kind("L40S-48GB", (8, 9), 46068),
    Kind("A40-48GB", (8, 6), 46068, rented=False),
    Kind("H100-80GB", (9, 0), 81559),
    Kind("A100-80GB", (8, 0), 81920),
    Kind("H100-94GB", (9, 0), 95830),
    Kind("H20-96GB", (9, 0), 97871, rented=False),
    Kind("GH200-96GB", (9, 0), 97871, rented=False),
    Kind("RTX-PRO-6000-96GB", (12, 0), 97887),
    Kind("H200-141GB", (9, 0), 143771),
    Kind("B200-180GB", (10, 0), 183359),
    Kind("GB200-186GB", (10, 0), 189471),
    Kind("B300-288GB", (10, 3), 275040),
    Kind("GB300-288GB", (10, 3), 275040),
    Kind("RTX-2080-Ti-11GB", (7, 5), 11264, rented=False),
    Kind("TITAN-RTX-24GB", (7, 5), 24576, rented=False),
    Kind("RTX-3060-12GB", (8, 6), 12288, rented=False),
    Kind("RTX-3070-8GB", (8, 6), 8192, rented=False),
    Kind("RTX-3080-10GB", (8, 6), 10240, rented=False),
    Kind("RTX-3080-12GB", (8, 6), 12288, rented=False),
    Kind("RTX-3080-Ti-12GB", (8, 6), 12288, rented=False),
    Kind("RTX-3090-24GB", (8, 6), 24576, rented=False),
    Kind("RTX-3090-Ti-24GB", (8, 6), 24564, rented=False),
    Kind("RTX-4060-8GB", (8, 9), 8188, rented=False),
    Kind("RTX-4060-Ti-8GB", (8, 9), 8188, rented=False),
    Kind("RTX-4060-Ti-16GB", (8, 9), 16380, rented=False),
    Kind("RTX-4070-12GB", (8, 9), 12282, rented=False),
    Kind("RTX-4070-SUPER-12GB", (8, 9), 12282, rented=False),
    Kind("RTX-4070-Ti-12GB", (8, 9), 12282, rented=False),
    Kind("RTX-4070-Ti-SUPER-16GB", (8, 9), 16376, rented=False),
    Kind("RTX-4080-16GB", (8, 9), 16376, rented=False),
    Kind("RTX-4080-SUPER-16GB", (8, 9), 16376, rented=False),
    Kind("RTX-4090-24GB", (8, 9), 24564, rented=False),
    Kind("RTX-5060-Ti-16GB", (12, 0), 16311, rented=False),
    Kind("RTX-5070-12GB", (12, 0), 12227, rented=False),
    Kind("RTX-5070-Ti-16GB", (12, 0), 16303, rented=False),
    Kind("RTX-5080-16GB", (12, 0), 16303, rented=False),
    Kind("RTX-5090-32GB", (12, 0), 32607, rented=False),
    Kind("RTX-A4000-16GB", (8, 6), 16376, rented=False),
    Kind("RTX-A5000-24GB", (8, 6), 24564, rented=False),
    Kind("RTX-A6000-48GB", (8, 6), 49140, rented=False),
    Kind("RTX-6000-Ada-48GB", (8, 9), 49140, rented=False),
)
_BY_NAME = {kind.name.lower(): kind for kind in _KINDS}

_SLICES: Mapping[str, str] = {
    "A30-24GB": "1g.6gb 2g.12gb 4g.24gb",
    "A100-40GB": "1g.5gb 1g.10gb 2g.10gb 3g.20gb 4g.20gb 7g.40gb",
    "A100-80GB": "1g.10gb 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb",
    "H100-80GB": "1g.10gb 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb",
    "H100-94GB": "1g.12gb 1g.24gb 2g.24gb 3g.47gb 4g.47gb 7g.94gb",
    "H20-96GB": "1g.12gb 1g.24gb 2g.24gb 3g.48gb 4g.48gb 7g.96gb",
    "GH200-96GB": "1g.12gb 1g.24gb 2g.24gb 3g.48gb 4g.48gb 7g.96gb",
    "RTX-PRO-6000-96GB": "1g.24gb 2g.48gb 4g.96gb",
    "H200-141GB": "1g.18gb 1g.35gb 2g.35gb 3g.71gb 4g.71gb 7g.141gb",
    "B200-180GB": "1g.23gb 1g.45gb 2g.45gb 3g.90gb 4g.90gb 7g.180gb",
    "GB200-186GB": "1g.23gb 1g.47gb 2g.47gb 3g.93gb 4g.93gb 7g.186gb",
    "B300-288GB": "1g.34gb 1g.67gb 2g.67gb 3g.135gb 4g.135gb 7g.269gb",
}
"""MIG profiles of each kind, the whole GPU last (NVIDIA MIG User Guide, "Supported MIG Profiles")."""
_SLICES_UNKNOWN = frozenset({"GB300-288GB"})
"""Kinds with MIG of which the profiles are not known here."""

_NOISE = {
    *("nvidia", "geforce", "tesla", "quadro", "gpu", "pcie", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "hbm3"),
    *("hbm3e", "generation", "blackwell", "server", "workstation", "edition"),
}
"""Words that a driver, a shop or a cloud adds to the name of a kind."""
_ALIASES = {"h100nvl": "h10094gb"}
ASSUMED_CAPABILITY = (8, 0)
"""Of a GPU of which only the size is known: every one sold for language models since 2020 has as much."""
EXAMPLES = "A100-80GB, 'RTX 4090', 24GB, or an instance type such as Standard_NC24ads_A100_v4 or g5.xlarge"


@dataclass(frozen=True, slots=True)
class NamedGpus:
    """GPUs as somebody named them."""

    hardware: Hardware
    assumed: str | None = None
    """What is taken for granted where the name does not say it; for the reader of a plan."""


def rented() -> tuple[str, ...]:
    """Return the kinds that clouds have, smallest first."""
    return tuple(kind.name for kind in sorted(_KINDS, key=lambda kind: kind.mebibytes) if kind.rented)


def of_kind(name: str, *, count: int = 1) -> Hardware:
    """Return the hardware with `count` GPUs of the kind called `name`; ConfigError for another name."""
    kind = _BY_NAME.get(name.lower())
    if kind is None:
        raise ConfigError(f"no GPU {name!r}{_hint(name)}")
    return Hardware("cuda", kind.name, kind.capability, kind.mebibytes << 20, count)


def most_slices(profile: str, kind: str | None) -> int | None:
    """Return how many MIG slices of `profile` one GPU of `kind` has; None where the kind is not known.

    Raises ConfigError, with the profiles that there are, for one that neither this kind nor any has.
    """
    wanted = re.split(r"[+]|(?<=gb)\.", profile)[0]
    known = _SLICES.get(kind or "", "").split()
    if kind is None or (not known and kind in _SLICES_UNKNOWN):
        if all(wanted not in names.split() for names in _SLICES.values()):
            raise ConfigError(
                f"no GPU known here has a MIG profile {profile!r}; one of an A100-80GB is 3g.40gb"
            )
        return None
    if wanted not in known:
        has = f"it has {', '.join(known)}" if known else "it has no MIG"
        raise ConfigError(f"{kind} has no MIG profile {profile!r}; {has}")
    (slices, size), (all_slices, whole) = _slice(wanted), _slice(known[-1])
    eighths = 8 if all_slices == 7 else all_slices
    return min(all_slices // slices, eighths // max(1, round(eighths * size / whole)))


def _slice(profile: str) -> tuple[int, int]:
    """Return the compute slices and the gigabytes of a profile such as 3g.40gb."""
    slices, size = profile.removesuffix("gb").split("g.")
    return int(slices), int(size)


def named(text: str) -> NamedGpus:
    """Return the GPUs that `text` means: a kind, an instance type, or a memory size; "2x" before it counts.

    Names are matched by their words: "NVIDIA GeForce RTX 3090", "rtx3090" and "3090" are one. Raises
    ConfigError where none or several are meant, with the nearest names.
    """
    counted = re.fullmatch(r"\s*(\d{1,2})\s*x\s+(.+)|\s*(\d{1,2})x(?=\D)(.+)", text, re.IGNORECASE)
    count = int(counted[1] or counted[3]) if counted else 1
    if count == 0:
        raise ConfigError(f"GPU {text!r}: expected one GPU at least, as in '2x A100-80GB'")
    name = (counted[2] or counted[4]).strip() if counted else text.strip()
    rented_type = instance_types.find(name)
    if rented_type is not None:
        return NamedGpus(of_instance_type(rented_type, times=count))
    size = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)\s*(gb|gib)", name, re.IGNORECASE)
    if size:
        return _of_size(float(size[1]), size[2], count)
    kinds = _matching(name)
    if any(kind.rented for kind in kinds[1:]):
        raise ConfigError(f"GPU {name!r} may be any of {', '.join(kind.name for kind in kinds)}: say which")
    if kinds:
        least = kinds[0].name
        others = ", ".join(kind.name for kind in kinds[1:])
        assumed = f"Assumed: {least}, the smallest of that name (also {others})." if others else None
        return NamedGpus(of_kind(least, count=count), assumed)
    raise ConfigError(f"no GPU {name!r} known here{_hint(name)}; expected {EXAMPLES}, or auto")


def of_instance_type(found: instance_types.InstanceType, *, times: int = 1) -> Hardware:
    """Return the GPUs of a cloud's machine; ConfigError where they are none that this project runs on."""
    if found.gpu is None:
        raise ConfigError(
            f"{found.name} has {found.accelerator}, which this project does not run on: it needs an NVIDIA "
            "GPU of compute capability 7.0 (V100) or newer"
        )
    return of_kind(found.gpu, count=found.count * times)


def _of_size(number: float, unit: str, count: int) -> NamedGpus:
    size = int(number * (1 << 30 if unit.lower() == "gib" else 10**9))
    major, minor = ASSUMED_CAPABILITY
    name = f"GPU of {number:g} {unit}"
    if size < 1 << 30:
        raise ConfigError(f"a GPU of {number:g} {unit} is too small to plan for, expected 1 GiB or more")
    assumed = (
        f"Assumed of {name}: {size / (1 << 30):.1f} GiB as the driver reports it, compute capability "
        f"{major}.{minor} or newer (bfloat16). A T4 or V100 has less: name it."
    )
    return NamedGpus(Hardware("cuda", name, ASSUMED_CAPABILITY, size, count), assumed)


def _matching(name: str) -> tuple[Kind, ...]:
    """Return the kinds that `name` may mean, smallest first: the memory may be left out, and "RTX"."""
    wanted = _plain(name)
    wanted = _ALIASES.get(wanted, wanted)
    exact = tuple(kind for kind in _KINDS if wanted == _plain(kind.name))
    if exact or not wanted:
        return exact
    short = {kind: _plain(kind.name.rpartition("-")[0]) for kind in _KINDS}
    return tuple(kind for kind, its in short.items() if wanted in (its, its.removeprefix("rtx")))


def _hint(name: str) -> str:
    """Return what `name` may have meant: the kinds that it begins with, else the nearest of all names."""
    wanted = _plain(name)
    begun = [kind.name for kind in _KINDS if wanted.startswith(_plain(kind.name.rpartition("-")[0]))]
    if begun:
        return f" (did you mean {' or '.join(map(repr, begun[:3]))}?)"
    kinds = nearest(name, (kind.name for kind in _KINDS), cutoff=0.7)
    return instance_types.hint(name) or kinds


def _plain(name: str) -> str:
    """Return the words of a name without those that tell nothing, in one."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return "".join(word for word in words if word not in _NOISE)
