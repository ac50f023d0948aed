"""Which GPUs CUDA shows to a process: CUDA_VISIBLE_DEVICES and MIG, by CUDA's own rules.

The rules are those of the CUDA Programming Guide, "CUDA Environment Variables", and of NVIDIA's MIG User
Guide, "CUDA Device Enumeration". A setting by which CUDA would see nothing, though nobody asked for that, is
refused: the job would run on the CPU. Knows the driver's GPUs (nvml.py), not torch. Start at `visible`.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from runtime import logs, nvml
from runtime.errors import ConfigError
from runtime.nvml import Device, NvmlError

log = logging.getLogger(__name__)

VARIABLE = "CUDA_VISIBLE_DEVICES"
USE_THE_CPU = f"{VARIABLE}= (empty) uses the CPU"
_NOTHING = frozenset({"nodevfiles", "none", "void"})
"""Words for "no device" that batch systems set; CUDA reads them as an index that does not exist."""

_INDEX = re.compile(r"[+-]?\d+")
_OLD_MIG_NAME = re.compile(r"MIG-(GPU-[^/]*)/(\d+)/(\d+)")
"""A MIG device before driver R470: its GPU, GPU instance and compute instance."""


@dataclass(frozen=True, slots=True)
class Visible:
    """The devices that CUDA shows."""

    devices: tuple[Device, ...]
    kinds: tuple[Device, ...]
    """Those to plan for: the same, or all that an index may mean where CUDA's order is not known."""


def none_requested(setting: str | None) -> bool:
    """Return whether the value of CUDA_VISIBLE_DEVICES asks for no device: empty, -1 or a word for it."""
    if setting is None:
        return False
    first = setting.split(",")[0].strip()
    index = _INDEX.match(first)
    return not setting.strip() or first.lower() in _NOTHING or (index is not None and int(index[0]) < 0)


def single(setting: str | None, number: int) -> str:
    """Return the value that shows a process only the GPU `number` of those that `setting` shows, from 0."""
    return str(number) if setting is None else setting.split(",")[number].strip()


def visible(setting: str | None, *, order: str | None = None) -> Visible:
    """Return what CUDA shows with these values of CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER.

    Nothing where the driver has no GPU. Call it within `nvml.opened`. Raises ConfigError when the setting, or
    MIG mode without a MIG device, leaves nothing, and NvmlError when the driver refuses.
    """
    count = nvml.count()
    if count == 0:
        return Visible((), ())
    chosen = [nvml.device(number) for number in range(count)] if setting is None else _chosen(setting, count)
    shown = _enumerated(chosen)
    by_index = setting is not None and _INDEX.match(setting.strip()) is not None
    if by_index and order != "PCI_BUS_ID" and len(chosen) < count and shown[0].parent is None:
        # CUDA numbers the fastest GPU 0, by a rule of its own; the driver numbers by the bus.
        every = _readable(count)
        if len({gpu.name() for gpu in every}) > 1:
            return Visible(shown, tuple(gpu for gpu in every if not gpu.in_mig_mode()))
    return Visible(shown, shown)


def _chosen(setting: str, count: int) -> list[Device]:
    """Return the devices that the entries name; the first that names none hides itself and the rest."""
    entries = [entry.strip() for entry in setting.split(",")]
    find: Callable[[str], Device | str]
    if entries[0].startswith(("GPU-", "MIG-")):
        find = partial(_by_uuid, gpus=_readable(count))
    else:
        find = partial(_by_index, count=count)
    chosen: list[Device] = []
    for entry in entries:
        found = find(entry)
        if isinstance(found, str) and not chosen:
            raise ConfigError(f"{VARIABLE} is {setting!r}: {found}, so CUDA sees no GPU; {USE_THE_CPU}")
        if isinstance(found, str):
            why = f"{VARIABLE} is {setting!r}: {found}, so CUDA sees only the {len(chosen)} before it"
            logs.once(log, logging.WARNING, why)
            break
        if found in chosen:
            raise ConfigError(f"{VARIABLE} is {setting!r}: {entry!r} is there twice, so CUDA sees no GPU")
        chosen.append(found)
    return chosen


def _by_index(entry: str, *, count: int) -> Device | str:
    """Return the GPU of an index, read as C's strtol does: "1gpu" is 1; or why there is none."""
    index = _INDEX.match(entry)
    if index is None:
        return f"{entry!r} is neither an index nor a UUID (GPU-…, MIG-…)"
    number = int(index[0])
    if not 0 <= number < count:
        return f"{entry!r} is none of the {count} GPU(s), 0 to {count - 1}"
    return nvml.device(number)


def _by_uuid(entry: str, *, gpus: Sequence[Device]) -> Device | str:
    """Return the device whose UUID begins with `entry`; or why there is not exactly one."""
    if entry.startswith("GPU-"):
        found = [gpu for gpu in gpus if gpu.uuid().startswith(entry)]
    elif entry.startswith("MIG-"):
        slices = [each for gpu in gpus for each in gpu.mig_devices()]
        found = [each for each in slices if each.uuid().startswith(entry)] or _by_old_name(entry, slices)
    else:
        found = []
    if len(found) == 1:
        return found[0]
    return f"{entry!r} is {'the beginning of several UUIDs' if found else 'no UUID of a GPU here'}"


def _by_old_name(entry: str, slices: Sequence[Device]) -> list[Device]:
    named = _OLD_MIG_NAME.fullmatch(entry)
    if named is None:
        return []
    instances = int(named[2]), int(named[3])
    return [
        each
        for each in slices
        if each.parent and each.parent.uuid().startswith(named[1]) and each.instances() == instances
    ]


def _readable(count: int) -> tuple[Device, ...]:
    """Return the GPUs that answer: one that is lost must not hide those that a setting names."""
    found, refused = [], None
    for number in range(count):
        try:
            gpu = nvml.device(number)
            gpu.uuid()
        except NvmlError as error:
            refused = error
        else:
            found.append(gpu)
    if not found and refused is not None:
        raise refused
    return tuple(found)


def _enumerated(chosen: Sequence[Device]) -> tuple[Device, ...]:
    """Return which of the chosen devices a CUDA process gets: one MIG device, or every GPU not in MIG mode.

    Where any MIG device can be used, CUDA takes the first and shows no other and no whole GPU.
    """
    slices: list[Device] = []
    whole: list[Device] = []
    for each in chosen:
        if each.parent is not None:
            slices.append(each)
        elif each.in_mig_mode():
            slices.extend(each.mig_devices())
        else:
            whole.append(each)
    if slices and len(slices) + len(whole) > 1:
        others = len(slices) + len(whole) - 1
        said = f"a CUDA process uses one MIG device: {slices[0].uuid()}, and none of {others} more"
        logs.once(log, logging.INFO, f"{said}; {VARIABLE} chooses")
    if not slices and not whole:
        gpu = f"GPU {chosen[0].number} ({chosen[0].name()})"
        raise ConfigError(
            f"{gpu} is in MIG mode and has no MIG device that may be used here; create or request one "
            f"(nvidia.com/mig-…), or turn MIG mode off; {USE_THE_CPU}"
        )
    return (slices[0],) if slices else tuple(whole)
