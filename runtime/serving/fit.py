"""What a server's settings ask of the memory plan (runtime/memory/serving.py). Start at `requested`."""

from runtime import hardware
from runtime.hardware import Hardware
from runtime.memory.serving import LEAST_CONTEXT_TOKENS, ServingRun
from runtime.memory.shape import Shape
from runtime.serving.settings import ServeConfig


def requested(config: ServeConfig, machine: Hardware, model: Shape) -> ServingRun:
    """Return the sequences, context and types that `config` asks for on `machine`."""
    limits, quantization = config.limits, config.quantization
    return ServingRun(
        sequences=limits.rows,
        context_tokens=limits.context_tokens or model.context_tokens,
        least_context_tokens=limits.context_tokens or LEAST_CONTEXT_TOKENS,
        dtype=hardware.compute_dtype(machine, config.model.dtype),
        engine=config.engine,
        bits=quantization.bits if quantization else None,
        double_quant=bool(quantization and quantization.double_quant),
    )
