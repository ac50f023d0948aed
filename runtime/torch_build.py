"""Whether the installed torch can use this machine's GPUs: its CUDA version, its code and the driver.

Known before anything is downloaded, and without importing torch: `usable_hardware`. Once torch is imported,
`check_loaded` asks torch itself. Does not choose devices (hardware.py). Start at `check`.
"""

import ast
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from runtime import hardware
from runtime.cuda_devices import USE_THE_CPU
from runtime.errors import ConfigError, one_line
from runtime.hardware import Hardware

CudaVersion = tuple[int, int]

ARCHITECTURES: Mapping[str, Mapping[CudaVersion, tuple[str, ...]]] = {
    "x86_64": {
        (12, 6): ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),
        (13, 0): ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
    },
    "aarch64": {
        (12, 6): ("sm_80", "sm_90"),
        (13, 0): ("sm_80", "sm_90", "sm_100", "sm_110", "sm_120", "compute_120"),
    },
}
"""What PyTorch's builds hold code for: sm_ compiled, compute_ for the driver to compile (PTX)."""

IMAGES: Mapping[str, CudaVersion] = {"cu130": (13, 0), "cu126": (12, 6)}
"""The builds of docker/Dockerfile for GPUs, newest first."""

_DRIVERS = {12: "R525", 13: "R580"}
"""The first driver that runs a CUDA major version; within one, an older driver runs a newer minor version."""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What torch was built for."""

    version: str
    cuda: CudaVersion | None
    """None for a build without CUDA."""
    architectures: tuple[str, ...] = ()
    """As torch.cuda.get_arch_list() names them; none where they are not known."""


def usable_hardware(*, quantized: bool = False) -> Hardware:
    """Return this machine's hardware, which the installed torch can use; imports no torch.

    `quantized` needs bitsandbytes' kernels too. Raises ConfigError, which names the image that fits, and the
    errors of `hardware.detect`.
    """
    machine, build = hardware.detect(), installed()
    if machine.kind == "cuda" and build is not None:
        check(machine, build)
        if quantized and build.cuda is not None:
            check_bitsandbytes(build.cuda)
    return machine


def check_loaded(machine: Hardware) -> None:
    """Have torch itself start CUDA on the GPUs of `machine`; imports torch where there are any.

    Raises ConfigError when torch has no code for them, or CUDA does not start or shows fewer devices.
    """
    if machine.kind == "cpu":
        return
    import torch

    version, cuda = str(torch.__version__), _version(torch.version.cuda)
    check(machine, TorchBuild(version, cuda))
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        count = torch.cuda.device_count()
    except RuntimeError as error:
        why = one_line(error)
        raise ConfigError(f"CUDA does not start on {machine.name}: {why}; {USE_THE_CPU}") from None
    check(machine, TorchBuild(version, cuda, tuple(torch.cuda.get_arch_list())))
    if count < machine.count:
        raise ConfigError(
            f"the driver has {machine.count} GPU(s) for this process, torch finds {count}; is "
            f"CUDA_VISIBLE_DEVICES written without spaces, and every GPU in order (nvidia-smi)? {USE_THE_CPU}"
        )


def installed() -> TorchBuild | None:
    """Return the build of the torch that an import would load, by its files; None where they do not say."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
        facts = _constants(text)
    except (OSError, SyntaxError, ValueError):
        return None
    if "cuda" not in facts or facts.get("hip"):
        return None
    cuda = _version(facts["cuda"])
    return TorchBuild(str(facts.get("__version__")), cuda, _architectures(cuda))


def check(machine: Hardware, build: TorchBuild) -> None:
    """Raise ConfigError when `build` cannot run on the GPUs of `machine`, with the image that can."""
    if machine.kind == "cpu":
        return
    if build.cuda is None:
        why = f"torch {build.version} has no CUDA, and this machine has {_described(machine)}"
    elif machine.driver is not None and machine.driver.cuda[0] < build.cuda[0]:
        why = (
            f"torch {build.version} needs a driver for CUDA {build.cuda[0]}"
            f"{_or_newer(build.cuda[0])}, and this machine has {_described(machine)}"
        )
    elif build.architectures and not _has_code(machine, build):
        known = ", ".join(build.architectures)
        why = f"torch {build.version} has no code for {_described(machine)}, but for {known}"
    else:
        return
    raise ConfigError(f"{why}; {_advice(machine)}; {USE_THE_CPU}")


def images_for(machine: Hardware) -> tuple[str, ...]:
    """Return the images that run on the GPUs of `machine` with its driver, newest CUDA first."""
    return tuple(name for name in IMAGES if _fits(machine, name))


def _fits(machine: Hardware, image: str) -> bool:
    cuda = IMAGES[image]
    driven = machine.driver is None or machine.driver.cuda[0] >= cuda[0]
    return driven and _has_code(machine, TorchBuild(image, cuda, _architectures(cuda)))


def _advice(machine: Hardware) -> str:
    fitting = images_for(machine)
    if fitting:
        return f"use the image for it, ACCELERATOR={fitting[0]}"
    for image in images_for(replace(machine, driver=None)):
        cuda = IMAGES[image][0]
        return f"update the driver to one for CUDA {cuda}{_or_newer(cuda)}, and use ACCELERATOR={image}"
    return "no image here has code for this GPU"


def _has_code(machine: Hardware, build: TorchBuild) -> bool:
    """Return whether compiled code runs on these GPUs, or the driver can compile it.

    Compiled code runs on its major version from its minor version on; with an "a" on that GPU only. PTX runs
    on all that are newer, where the driver is not older than the compiler it came from.
    """
    if machine.capability is None:
        return True
    compiles = machine.driver is None or build.cuda is None or machine.driver.cuda >= build.cuda
    for architecture in build.architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        if not digits.isdecimal():
            continue
        made_for = int(digits[:-1] or 0), int(digits[-1])
        if number.endswith("a"):
            runs = machine.capability == made_for
        elif kind == "sm":
            runs = machine.capability[0] == made_for[0] and machine.capability >= made_for
        else:
            runs = compiles and machine.capability >= made_for
        if runs:
            return True
    return False


def check_bitsandbytes(cuda: CudaVersion) -> None:
    """Refuse where bitsandbytes has no library for this CUDA version's major number, by which it chooses."""
    spec = find_spec("bitsandbytes")
    if spec is None or not spec.submodule_search_locations:
        return
    folder = Path(spec.submodule_search_locations[0])
    if not any(folder.glob(f"libbitsandbytes_cuda{cuda[0]}?.so")):
        raise ConfigError(
            f"bitsandbytes has no library for CUDA {cuda[0]} in {folder}; install it anew, or leave the "
            "quantisation out"
        )


def _constants(text: str) -> dict[str, object]:
    """Return the names that a Python file of plain assignments sets to constants."""
    found: dict[str, object] = {}
    for line in ast.parse(text).body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        value = getattr(line, "value", None)
        if isinstance(value, ast.Constant):
            found.update({target.id: value.value for target in targets if isinstance(target, ast.Name)})
    return found


def _version(text: object) -> CudaVersion | None:
    if text is None:
        return None
    major, _, minor = str(text).partition(".")
    return int(major), int(minor.partition(".")[0] or 0)


def _architectures(cuda: CudaVersion | None) -> tuple[str, ...]:
    return ARCHITECTURES.get(platform.machine(), {}).get(cuda, ()) if cuda is not None else ()


def _or_newer(cuda_major: int) -> str:
    return f" ({_DRIVERS[cuda_major]} or newer)" if cuda_major in _DRIVERS else ""


def _described(machine: Hardware) -> str:
    major, minor = machine.capability or (0, 0)
    facts = f"compute capability {major}.{minor}"
    if machine.driver is not None:
        facts += (
            f", driver {machine.driver.version} for CUDA {machine.driver.cuda[0]}.{machine.driver.cuda[1]}"
        )
    return f"{machine.name} ({facts})"
