"""Machines with GPUs, for tests: scenarios for the stand-in libnvidia-ml.so.1 of nvml_standin.c.

`RuntimeOn` (fixture runtime_on) runs a command in a process that sees these GPUs through the real pynvml;
`NvmlProcess.ask` (nvml_process) runs one function in a process that is kept, for many cases. Start at
`Machine`.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, DRIVER_NOT_LOADED, NO_SUCH_CALL = 3, 4, 6, 9, 13
GPU_IS_LOST, VERSION_MISMATCH, UNKNOWN = 15, 18, 999
"""Codes that NVML answers."""


@dataclass(frozen=True)
class Mig:
    """A MIG device: a slice of a GPU."""

    uuid: str
    mebibytes: int
    name: str
    instance: int = 1
    compute: int = 0


@dataclass(frozen=True)
class Gpu:
    """A GPU; in MIG mode with `mig` devices, or with `mig_mode` alone where there are none."""

    name: str
    capability: tuple[int, int]
    mebibytes: int
    uuid: str = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
    mig: tuple[Mig, ...] = ()
    mig_mode: bool = False


@dataclass(frozen=True)
class Machine:
    """What the driver of a machine answers."""

    gpus: tuple[Gpu, ...] = ()
    refusals: Mapping[str, int | tuple[int, str]] = field(default_factory=dict)
    """Call -> the code that it answers, for all devices or for the one with the UUID beside it."""
    driver: str = "580.65.06"
    cuda: int = 13000

    def environment(self, folder: Path, library: Path, **variables: str) -> dict[str, str]:
        """Return the environment of a process that sees this machine; the scenario is written to `folder`."""
        scenario = folder / "nvml-scenario"
        scenario.write_text(self.scenario())
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        return {**kept, "LD_LIBRARY_PATH": str(library.parent), "NVML_STANDIN": str(scenario), **variables}

    def scenario(self) -> str:
        """Return the text that nvml_standin.c reads."""
        lines = [f"driver {self.driver}", f"cuda {self.cuda}"]
        for gpu in self.gpus:
            mode = int(gpu.mig_mode or bool(gpu.mig))
            major, minor = gpu.capability
            lines.append(f"gpu {gpu.uuid} {major} {minor} {gpu.mebibytes} {mode} {gpu.name}")
            lines += [f"mig {m.uuid} {m.instance} {m.compute} {m.mebibytes} {m.name}" for m in gpu.mig]
        for call, answer in self.refusals.items():
            code, uuid = answer if isinstance(answer, tuple) else (answer, "*")
            lines.append(f"refuse {call} {code} {uuid}")
        return "\n".join(lines) + "\n"


T4 = Gpu("Tesla T4", (7, 5), 15360, uuid="GPU-75f937d7-0000-4106-c12f-20bd9faed9f6")
V100 = Gpu("Tesla V100-SXM2-16GB", (7, 0), 16160, uuid="GPU-70d72c41-0000-4106-c12f-20bd9faed9f6")
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 81920)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 81559, uuid="GPU-90a1b2c3-0000-4106-c12f-20bd9faed9f6")
SLICES = (
    Mig("MIG-11111111-aaaa-5556-b2ea-7e549465741e", 9856, "NVIDIA A100-SXM4-80GB MIG 1g.10gb", instance=7),
    Mig("MIG-22222222-bbbb-5556-b2ea-7e549465741e", 40192, "NVIDIA A100-SXM4-80GB MIG 3g.40gb", instance=2),
)
SLICED = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 81920, mig=SLICES)
IN_A_CONTAINER = {"nvmlDeviceGetMemoryInfo": (NO_PERMISSION, SLICED.uuid)}
"""What the parent of MIG devices refuses in a container that was given one of them."""


def compile_library(folder: Path) -> Path:
    """Compile the stand-in below `folder` and return it."""
    library = folder / "libnvidia-ml.so.1"
    source = Path(__file__).with_suffix(".c")
    command = ["cc", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return library


class NvmlProcess:
    """A process in which pynvml loads the stand-in; each question sets its machine and variables anew."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._scenario = folder / "nvml-scenario"
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        with _environment({"LD_LIBRARY_PATH": str(library.parent), "NVML_STANDIN": str(self._scenario)}):
            self._pool.submit(os.getpid).result()

    def ask(self, machine: Machine, function: Callable[[], Any], **variables: str) -> Any:
        """Return what `function` returns on `machine` with these variables, or raise what it raises."""
        return self.ask_with_log(machine, function, **variables)[0]

    def ask_with_log(
        self, machine: Machine, function: Callable[[], Any], **variables: str
    ) -> tuple[Any, list[str]]:
        """Return what `function` returns, and the lines that it logged."""
        self._scenario.write_text(machine.scenario())
        answer: tuple[Any, list[str]] = self._pool.submit(_answer, function, variables).result(60)
        return answer

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


class RuntimeOn:
    """The command line, on a machine of one's choice."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._library, self._folder = library, folder

    def __call__(
        self, machine: Machine, *words: str, start: tuple[str, ...] = ("-m", "runtime"), **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run `runtime WORDS` with these variables to its end; `start` names another program of Python's."""
        return subprocess.run(
            [sys.executable, *start, *words],
            env=machine.environment(self._folder, self._library, **variables),
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _answer(function: Callable[[], Any], variables: Mapping[str, str]) -> tuple[Any, list[str]]:
    from runtime import logs

    logs.once.cache_clear()
    seen, root = _Lines(), logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(seen)
    for name in [name for name in os.environ if name.startswith("CUDA_")]:
        del os.environ[name]
    try:
        with _environment(variables):
            return function(), seen.lines
    finally:
        root.removeHandler(seen)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
