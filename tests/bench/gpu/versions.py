"""Step 1: the versions, what the driver and NVML say, which bitsandbytes library loads, and two ceilings.

Everything measured later is held against the copy's bandwidth and the product's rate. Start at `run`.
"""

import dataclasses
import platform
from functools import partial
from importlib import metadata

import torch

from runtime import hardware, utilisation
from tests.bench.gpu.step import Context, Figures, NotHereError

PACKAGES = (
    "transformers", "peft", "accelerate", "bitsandbytes", "triton", "tokenizers", "trl", "nvidia-ml-py"
)  # fmt: skip


def run(context: Context) -> None:
    """Write down what is here."""
    context.case("torch", _torch)
    context.case("packages", _packages)
    context.case("gpu", lambda: _gpu(context))
    context.case("nvml: detect", lambda: dataclasses.asdict(hardware.detect()))
    context.case("nvml: utilisation", _utilisation)
    context.case("copy", lambda: {"gb_per_s": context.copy_gb_per_s()})
    for dtype in (torch.bfloat16, torch.float16):
        context.case(f"product, {dtype}", partial(_product, context, dtype))
    context.case("bitsandbytes", lambda: _bitsandbytes(context))


def _torch() -> Figures:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "arch_list": " ".join(torch.cuda.get_arch_list()),
    }


def _packages() -> Figures:
    found: Figures = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _gpu(context: Context) -> Figures:
    if context.device != "cuda":
        raise NotHereError("no GPU")
    free, total = torch.cuda.mem_get_info()
    here = context.machine
    return {
        "name": here.name,
        "capability": f"{here.capability}",
        "memory_gib": total / 2**30,
        "free_gib": free / 2**30,
        "context_mib": (total - free) / 2**20,
        "count": torch.cuda.device_count(),
    }


def _utilisation() -> Figures:
    """Return what the metrics endpoints would say of the first GPU."""
    seen = utilisation.gpus()
    return {"gpus": len(seen)} | (dataclasses.asdict(seen[0]) if seen else {})


def _product(context: Context, dtype: torch.dtype) -> Figures:
    if context.device == "cpu" and dtype == torch.float16:
        raise NotHereError("no float16 on a CPU")
    return {"tflop_per_s": context.matmul_tflop_per_s(dtype)}


def _bitsandbytes(context: Context) -> Figures:
    """Return which library loaded, and that it can quantise, restore and multiply on this device."""
    import bitsandbytes
    from bitsandbytes import cextension, functional

    weight = torch.randn(256, 256, device=context.device).to(context.dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    restored = functional.dequantize_4bit(packed, state)
    layer = bitsandbytes.nn.Linear4bit(256, 256, bias=False, quant_type="nf4").to(context.device)
    product = layer(torch.randn(4, 256, device=context.device).to(context.dtype))
    library = getattr(getattr(cextension.lib, "_lib", None), "_name", type(cextension.lib).__name__)
    error = float((restored - weight).norm() / weight.norm())
    found = {"library": str(library).rpartition("/")[2], "nf4_error": error}
    if error > 0.15 or not bool(product.isfinite().all()):
        found["fault"] = "4-bit weights are not what was quantised"
    return found
