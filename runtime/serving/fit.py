"""What a server's settings ask of the memory plan (runtime/memory/serving.py), and how it is laid over GPUs.

The same for `runtime plan`, which shows it, and `runtime manifest`, which makes pods of it. Start at
`lay_out`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from runtime import hardware
from runtime.errors import ConfigError
from runtime.hardware import Hardware
from runtime.memory import serving
from runtime.memory.serving import LEAST_CONTEXT_TOKENS, Capacity, ServingRun
from runtime.memory.shape import Shape
from runtime.serving.settings import ServeConfig


@dataclass(frozen=True, slots=True)
class ServerLayout:
    """Equal servers side by side on the GPUs of one machine."""

    servers: int
    gpus: int
    """Of each server; 0 on a CPU."""
    run: ServingRun
    capacity: Capacity
    """Of one GPU, or of one process on a CPU."""
    indivisible: str = ""
    """Why the model is not divided among more of the GPUs."""

    @property
    def divided(self) -> bool:
        """Whether one model is divided among GPUs."""
        return self.run.processes > 1

    @property
    def fits(self) -> bool:
        """Whether at least one sequence fits beside the weights."""
        return self.capacity.fits


def requested(config: ServeConfig, machine: Hardware, model: Shape) -> ServingRun:
    """Return the sequences, context and types that `config` asks for on `machine`."""
    limits, quantization = config.limits, config.quantization
    return ServingRun(
        sequences=limits.rows_on(machine.kind),
        context_tokens=limits.context_tokens or model.context_tokens,
        least_context_tokens=limits.context_tokens or LEAST_CONTEXT_TOKENS,
        dtype=hardware.compute_dtype(machine, config.model.dtype),
        engine=config.engine,
        bits=quantization.bits if quantization else None,
        double_quant=bool(quantization and quantization.double_quant),
        copies=config.replicas,
        memory_share=limits.gpu_memory_share,
    )


def lay_out(config: ServeConfig, machine: Hardware, model: Shape) -> ServerLayout:
    """Return how `config` is served on the GPUs of `machine`: as it says, else with the fewest that hold it.

    More GPUs are taken where fewer hold no sequence of the context that is asked for. Raises ConfigError for
    what the settings ask and this machine cannot do; a layout that does not fit says so itself.
    """
    wanted = requested(config, machine, model)
    if is_laid_out(config):
        processes = gpus_of_a_model(config, machine)
        reason = indivisible(config, model, processes)
        if reason:
            raise ConfigError(f"parallel tp with {processes} processes: {reason}")
        return _layout(model, replace(wanted, processes=processes), machine)
    reason, found = "", []
    for processes in _divisors(machine.count):
        reason = indivisible(config, model, processes)
        if not reason:
            found.append(_layout(model, replace(wanted, processes=processes), machine))
    enough = min(wanted.least_context_tokens, model.context_tokens)
    fitting = [it for it in found if it.capacity.context_tokens >= enough] or [it for it in found if it.fits]
    return fitting[0] if fitting else replace(found[-1], indivisible=reason)


def is_laid_out(config: ServeConfig) -> bool:
    """Whether the settings say themselves how many GPUs a server has."""
    return config.parallel == "tp" or config.replicas > 1 or _vllm_processes(config) is not None


def gpus_of_a_model(config: ServeConfig, machine: Hardware) -> int:
    """Return how many processes `config` divides a model among; ConfigError where the GPUs are too few."""
    processes = _vllm_processes(config) or 1
    if config.parallel == "tp":
        processes = config.processes or max(1, machine.count // config.replicas)
    needed = processes * config.replicas
    if machine.kind == "cuda" and needed > machine.count:
        setting = f"replicas is {config.replicas}" if config.replicas > 1 else f"processes is {processes}"
        raise ConfigError(f"{setting}, each on a GPU of its own, and a node has {machine.count}")
    return processes


def indivisible(config: ServeConfig, model: Shape, count: int) -> str:
    """Return why `count` GPUs cannot divide the model, "" where they can (engine/parallel/shard.py)."""
    size = model.dimensions
    if count == 1:
        return ""
    heads = f"{size.heads} attention heads cannot be divided among {count} GPUs"
    if config.engine == "vllm":  # which divides what it serves, quantised or not
        return heads if size.heads % count else ""
    if not model.family.own_layers:
        return f"{model.model_type} models cannot be divided among GPUs"
    if model.quantized is not None or config.quantization is not None:
        return "quantised weights cannot be divided among GPUs"
    if size.heads % count or size.intermediate % count or (size.kv_heads % count and count % size.kv_heads):
        return heads
    return ""


def warnings(layout: ServerLayout, config: ServeConfig, model: Shape) -> Iterator[str]:
    """Yield what of the context that `config` asks for is not served."""
    if beyond := beyond_the_model(config, model.context_tokens):
        yield beyond
    served, run = layout.capacity.context_tokens, layout.run
    least = min(run.context_tokens, run.least_context_tokens, model.context_tokens)
    if layout.fits and served < least:
        yield f"memory allows requests of {served} tokens, not {least}"


def beyond_the_model(config: ServeConfig, context_tokens: int) -> str | None:
    """Return a warning where `config` asks for a longer context than the model's."""
    asked = config.limits.context_tokens
    if asked is None or asked <= context_tokens:
        return None
    name = config.served_name
    return f"limits.context_tokens is {asked}, but {name} was made for {context_tokens}: so many are served"


def _vllm_processes(config: ServeConfig) -> int | None:
    """Return the tensor parallelism among the flags for vLLM."""
    flags = {name.lstrip("-").replace("_", "-"): value for name, value in config.vllm.flags.items()}
    size = flags.get("tensor-parallel-size") if config.engine == "vllm" else None
    text = str(size)
    return int(text) if text.isdecimal() and int(text) > 1 else None


def _layout(model: Shape, run: ServingRun, machine: Hardware) -> ServerLayout:
    gpus = run.processes * run.copies if machine.kind == "cuda" else 0
    return ServerLayout(
        machine.count // gpus if gpus else 1, gpus, run, serving.forecast(model, run, machine)
    )


def _divisors(count: int) -> Iterator[int]:
    yield from (number for number in range(1, count + 1) if count % number == 0)
