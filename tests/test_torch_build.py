"""Image against GPU and driver: what runs, what is refused and the image that fits, before any download."""

import json
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import hardware, torch_build
from runtime.errors import ConfigError
from runtime.hardware import Driver, Hardware
from runtime.torch_build import TorchBuild, check, images_for
from runtime.tuning.process import failure
from tests.nvml_standin import (
    A100,
    GPU_IS_LOST,
    IN_A_CONTAINER,
    SLICED,
    V100,
    Machine,
    NvmlProcess,
    RuntimeOn,
)

CU130 = TorchBuild(
    "2.13.0+cu130", (13, 0), ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
)
CU126 = TorchBuild("2.13.0+cu126", (12, 6), ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"))
CPU_ONLY = TorchBuild("2.13.0+cpu", None)
R525, R535 = Driver("525.60.13", (12, 0)), Driver("535.129.03", (12, 2))
R570, R580 = Driver("570.133.20", (12, 8)), Driver("580.65.06", (13, 0))
OLD = Driver("470.199.02", (11, 4))


def gpu(capability: tuple[int, int], driver: Driver | None) -> Hardware:
    return Hardware("cuda", "a GPU", capability, 16 << 30, 1, driver)


@pytest.mark.parametrize(
    ("build", "capability", "driver"),
    [
        (CU130, (7, 5), R580),
        (CU130, (8, 0), R580),
        (CU130, (8, 6), R580),
        (CU130, (8, 9), R580),
        (CU130, (9, 0), R580),
        (CU130, (10, 3), R580),
        (CU130, (12, 1), R580),
        (CU130, (13, 0), Driver("700.1", (14, 0))),
        (CU126, (7, 0), R525),
        (CU126, (9, 0), R535),
        (CU126, (7, 0), R580),
        (CU126, (8, 9), None),
        (replace(CU130, architectures=()), (7, 0), R580),
        (replace(CU130, architectures=("sm_90a",)), (9, 0), R580),
        (replace(CU130, architectures=("sm_100f",)), (10, 3), R580),
    ],
)
def test_a_build_runs_on_its_major_version_and_any_driver_of_its_own(
    build: TorchBuild, capability: tuple[int, int], driver: Driver | None
) -> None:
    check(gpu(capability, driver), build)


@pytest.mark.parametrize(
    ("build", "capability", "driver", "why", "advice"),
    [
        (CU130, (7, 0), R580, "no code for a GPU .compute capability 7.0", "ACCELERATOR=cu126"),
        (CU130, (7, 0), R535, "needs a driver for CUDA 13", "ACCELERATOR=cu126"),
        (CU130, (9, 0), R570, r"for CUDA 13 \(R580 or newer\).* driver 570.133.20", "ACCELERATOR=cu126"),
        (CU130, (10, 0), R570, "needs a driver for CUDA 13", "update the driver.*R580.*ACCELERATOR=cu130"),
        (CU126, (10, 0), R580, "no code for a GPU .compute capability 10.0", "ACCELERATOR=cu130"),
        (CU126, (8, 0), OLD, "needs a driver for CUDA 12", "update the driver.*R580.*ACCELERATOR=cu130"),
        (CU126, (7, 0), OLD, "needs a driver for CUDA 12", "update the driver.*R525.*ACCELERATOR=cu126"),
        (CU130, (3, 7), OLD, "needs a driver for CUDA 13", "no image here has code for this GPU"),
        (CPU_ONLY, (9, 0), R580, "2.13.0.cpu has no CUDA", "ACCELERATOR=cu130"),
        (CPU_ONLY, (7, 0), R580, "has no CUDA, and this machine has a GPU", "ACCELERATOR=cu126"),
        (replace(CU130, architectures=("sm_90a",)), (9, 1), R580, "no code", "ACCELERATOR=cu130"),
        (replace(CU130, architectures=("sm_86",)), (8, 0), R580, "no code", "ACCELERATOR=cu130"),
        (replace(CU126, architectures=("compute_90",)), (10, 0), R535, "no code", "update the driver"),
    ],
)
def test_a_build_that_cannot_run_names_the_image_that_fits(
    build: TorchBuild, capability: tuple[int, int], driver: Driver, why: str, advice: str
) -> None:
    with pytest.raises(ConfigError, match=f"{why}.*; .*{advice}.*; CUDA_VISIBLE_DEVICES= .empty. uses"):
        check(gpu(capability, driver), build)


def test_a_cpu_needs_no_cuda() -> None:
    check(Hardware("cpu", "CPU", None, 8 << 30, 1), CPU_ONLY)
    check(Hardware("cpu", "CPU", None, 8 << 30, 1), CU130)


def test_the_newest_image_that_fits_comes_first() -> None:
    assert images_for(gpu((8, 0), R580)) == ("cu130", "cu126")
    assert images_for(gpu((8, 0), R535)) == ("cu126",)
    assert images_for(gpu((12, 0), R570)) == ()


def test_the_builds_known_here_are_those_that_torch_knows() -> None:
    import torch.cuda

    for machine, builds in torch_build.ARCHITECTURES.items():
        for (major, minor), names in builds.items():
            compiled = {int(name.removeprefix("sm_")) for name in names if name.startswith("sm_")}
            assert compiled == torch.cuda.PYTORCH_RELEASES_CODE_CC[f"{major}.{minor}"][machine]


def test_the_images_known_here_are_those_of_the_dockerfile() -> None:
    script = (Path(__file__).parents[1] / "docker" / "install.sh").read_text()
    built = dict(re.findall(r"^  (cu\d+)\) wanted=(\d+\.\d+) ;;", script, re.MULTILINE))
    assert built == {name: f"{major}.{minor}" for name, (major, minor) in torch_build.IMAGES.items()}


def test_the_installed_torch_is_known_without_importing_it() -> None:
    code = "import sys; from runtime import torch_build as t; print(t.installed(), 'torch' in sys.modules)"
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    import torch

    assert f"version='{torch.__version__}'" in said
    assert said.endswith("False\n")


def write_torch(folder: Path, version: str, cuda: str | None) -> None:
    """Write the file by which a build of torch is known, as its release has it."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").touch()
    text = f"from typing import Optional\n\n__version__ = {version!r}\ndebug = False\n"
    text += f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    (folder / "torch" / "version.py").write_text(text)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the images are built for x86_64")
def test_another_build_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torch(tmp_path, "2.13.0", "13.0")  # the usual index lists the cu130 build without a suffix
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    found = torch_build.installed()
    assert found == TorchBuild("2.13.0", (13, 0), CU130.architectures)


def test_a_quantised_model_needs_bitsandbytes_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "libbitsandbytes_cuda126.so").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    torch_build.check_bitsandbytes((12, 8))
    with pytest.raises(ConfigError, match="bitsandbytes has no library for CUDA 13"):
        torch_build.check_bitsandbytes((13, 0))


REFUSED = Machine((A100,), {"nvmlDeviceGetMemoryInfo": GPU_IS_LOST})
"""A GPU that would be taken for a CPU if a refused question counted as an answer."""

TUNE = ("tune", "phi-3-mini-4k-instruct", "--data", "http://127.0.0.1:9/rows.parquet", "--output", "out")
SERVE = ("serve", "phi-3-mini-4k-instruct", "--port", "0")
PLAN = ("plan", "phi-3-mini-4k-instruct")


@pytest.mark.parametrize("words", [TUNE, SERVE, (*SERVE, "--check"), (*SERVE, "--engine", "vllm"), PLAN])
def test_a_driver_that_refuses_ends_the_command(words: tuple[str, ...], runtime_on: RuntimeOn) -> None:
    done = runtime_on(REFUSED, *words)
    assert done.returncode == 2, done.stderr
    assert "refused nvmlDeviceGetMemoryInfo for GPU 0: GPU is lost; reset the GPU" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "cuda", "machine", "advice"),
    [
        (TUNE, None, Machine((A100,)), "ACCELERATOR=cu130"),
        (SERVE, "13.0", Machine((V100,)), "ACCELERATOR=cu126"),
        (PLAN, "13.0", Machine((A100,), driver="535.129.03", cuda=12020), "ACCELERATOR=cu126"),
    ],
)
def test_a_torch_for_other_machines_ends_the_command(
    words: tuple[str, ...],
    cuda: str | None,
    machine: Machine,
    advice: str,
    runtime_on: RuntimeOn,
    tmp_path: Path,
) -> None:
    """`torch` is a package of its version file alone: a command that imported torch would fail otherwise."""
    write_torch(tmp_path, "2.13.0", cuda)
    done = runtime_on(machine, *words, PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[1]}")
    assert done.returncode == 2, done.stderr
    assert "torch 2.13.0 " in done.stderr
    assert advice in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        (*TUNE, "--processes", "2"),
        (*SERVE, "--parallel", "tp", "--processes", "2"),
        (*SERVE, "--replicas", "2"),
    ],
)
def test_more_processes_than_gpus_end_the_command(
    words: tuple[str, ...], runtime_on: RuntimeOn, tmp_path: Path
) -> None:
    """Two MIG devices are one for a process, and so for a job."""
    write_torch(tmp_path, "2.13.0", "13.0")
    sliced = Machine((SLICED,), IN_A_CONTAINER)
    done = runtime_on(sliced, *words, PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[1]}")
    assert done.returncode == 2, done.stderr
    assert "2 processes, but only 1 GPU(s) are visible (NVIDIA A100-SXM4-80GB MIG 1g.10gb)" in done.stderr


def test_a_plan_for_the_cpu_or_for_a_gpu_by_name_asks_no_driver(runtime_on: RuntimeOn) -> None:
    by_request = runtime_on(REFUSED, *PLAN, "--json", CUDA_VISIBLE_DEVICES="")
    assert '"device"' in by_request.stdout, by_request.stderr
    by_name = runtime_on(REFUSED, *PLAN, "--gpu", "V100-16GB", "--json")
    assert by_name.returncode == 0, by_name.stderr


def check_loaded() -> None:
    torch_build.check_loaded(hardware.detect())


def test_a_worker_asks_the_torch_that_it_has_loaded(nvml_process: NvmlProcess) -> None:
    """Under `accelerate launch` or torchrun there is no parent process to have asked before."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    with pytest.raises(ConfigError, match=f"torch {re.escape(torch.__version__)} has no CUDA"):
        nvml_process.ask(Machine((A100,)), check_loaded)


def test_the_reason_is_in_a_pods_termination_log(runtime_on: RuntimeOn, tmp_path: Path) -> None:
    log = failure.termination_log(tmp_path)
    log.parent.mkdir()
    log.touch()
    code = (
        "import os, sys; from pathlib import Path; from runtime.pod import inference; "
        "sys.exit(inference.main(inference.transformers_server, sys.argv[1:], os.environ, root=Path.cwd()))"
    )
    model = ("--pretrained_model_name_or_path", "phi-3-mini-4k-instruct")
    done = runtime_on(REFUSED, *model, start=("-c", code))
    assert done.returncode == 2, done.stderr
    record = json.loads(log.read_text())
    assert (record["phase"], record["code"]) == ("serve", 2)
    assert "nvmlDeviceGetMemoryInfo" in record["message"]
