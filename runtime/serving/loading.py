"""From a ServeConfig to a ServedModel: weights, tokenizer, engine, adapters.

Runs in a thread of its own, once (http/server.py). A bad adapter is refused by name and the rest is served;
a bad model ends the process. Does not know HTTP. Start at `load`.
"""

import contextlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import adapters, attention, hardware, models, oci, support, torch_build
from runtime.errors import ConfigError, Failure, one_line
from runtime.files import temporary_folder
from runtime.hardware import Hardware
from runtime.serving.engine.create import create
from runtime.serving.engine.replicas import engine as replicas
from runtime.serving.generation_config import sampling_defaults
from runtime.serving.lifecycle import ServedModel
from runtime.serving.settings import SOURCED_RANK, AdapterSource, ServeConfig
from runtime.serving.settings import check as check_settings
from runtime.serving.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from runtime.serving.engine.model_runner import Rank
    from runtime.serving.engine.parallel.workers import Workers
    from runtime.serving.engine.protocol import Engine

log = logging.getLogger(__name__)

COMBINED = "combined_adapter"
"""The adapter that all others are combined into, by the name it has in KAITO's runtime."""


def load(config: ServeConfig, access: oci.Access) -> ServedModel:
    """Return the model of `config` behind an engine, with every adapter that could be loaded.

    Raises ConfigError, CapacityError or TransientError when the base model cannot be served.
    """
    started = time.monotonic()
    devices = hardware.detect()
    support.check_server(config.model, config.quantization, devices, engine=config.engine)
    if config.engine == "own":
        support.check_architecture(config.model)
    located = config.model.model_copy(update={"path": models.locate(config.model)})
    config = config.model_copy(update={"model": located})  # once: a tag may be another model's by now
    if config.engine == "vllm":
        served = _with_vllm(config, devices)
    elif config.replicas > 1:
        served = _with_replicas(config, devices)
    else:
        served = _with_own_engine(config, devices)
    served = replace(
        served,
        aliases=config.served_aliases,
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
        digest=models.digest(config.model),
    )
    served.form_for(None)  # tries the template out, which takes a moment that no request shall wait for
    if config.combine_adapters and config.adapters:
        served = _combined(served, config, access)
    else:
        for source in config.adapters:
            try:
                add_adapter(served, source, config, access=access)
            except Exception as error:
                _refuse(served, source, error)
    log.info("Loaded %s on %s in %.1f s", config.model.name, devices.name, time.monotonic() - started)
    return served


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model behind this project's own engine, in this process."""

    engine: "Engine"
    weights: str
    """Their type, size and device."""
    generation_config: dict[str, Any]
    """The model's defaults, those of its configuration too."""


def load_own_engine(config: ServeConfig, devices: Hardware) -> LoadedModel:
    """Return the model behind this project's own engine; one of `config.replicas` takes its share of a CPU.

    Raises as `load` does.
    """
    torch_build.check_loaded(devices)  # vLLM has a torch of its own
    import torch

    attention.disable_cudnn()
    threads = min(torch.get_num_threads(), hardware.usable_cores())
    torch.set_num_threads(max(1, threads // config.replicas))
    with contextlib.ExitStack() as undo:
        model, workers, rank = _model(config, devices, undo)
        running = create(config, model, rank=rank)
        if workers is not None:
            workers.watch(running.abort)
        undo.pop_all()
    return LoadedModel(
        engine=running,
        weights=f"{_format(config, model)}, {model.get_memory_footprint() / 2**20:.1f} MiB on {devices.name}"
        + (f", on each of {rank.group.world}" if rank is not None else ""),
        generation_config=model.generation_config.to_diff_dict() if model.generation_config else {},
    )


def _with_own_engine(config: ServeConfig, devices: Hardware) -> ServedModel:
    """Return the model behind this project's own engine."""
    tokenizer = models.load_tokenizer(config.model)
    loaded = load_own_engine(config, devices)
    return ServedModel(
        name=config.served_name,
        engine=loaded.engine,
        tokenizer=_prompt_tokenizer(
            config, loaded.generation_config, tokenizer, loaded.engine.context_tokens
        ),
        created=int(time.time()),
        weights=loaded.weights,
    )


def _with_replicas(config: ServeConfig, devices: Hardware) -> ServedModel:
    """Return the model behind several processes that each load all of it; this one loads its tokenizer."""
    source = config.model.model_copy(update={"path": models.locate(config.model)})
    tokenizer = models.load_tokenizer(source)
    # requests wait here; what a process is sent beyond its rows waits for those that were cancelled
    limits = config.limits.model_copy(update={"queue": config.limits.rows})
    task = config.model_copy(
        update={"model": source, "limits": limits, "api_key": None, "api_key_file": None, "adapters": ()}
    )
    running, first = replicas.start(task, devices, max_waiting=config.replicas * config.limits.queue)
    return ServedModel(
        name=config.served_name,
        engine=running,
        tokenizer=_prompt_tokenizer(config, first.generation_config, tokenizer, running.context_tokens),
        created=int(time.time()),
        weights=f"{first.weights}, on each of {config.replicas}",
    )


def _with_vllm(config: ServeConfig, devices: Hardware) -> ServedModel:
    """Return the model behind a vLLM that reads the weights itself."""
    from runtime.serving.engine.backends import vllm

    folder = models.locate(config.model)
    source = config.model.model_copy(update={"path": folder})
    tokenizer, generation_config = models.load_tokenizer(source), models.load_generation(folder)
    running = vllm.start(config, folder, devices)
    return ServedModel(
        name=config.served_name,
        engine=running,
        tokenizer=_prompt_tokenizer(config, generation_config, tokenizer, running.context_tokens),
        created=int(time.time()),
        weights=f"by vLLM on {devices.name}",
    )


def _model(
    config: ServeConfig, devices: Hardware, undo: contextlib.ExitStack
) -> "tuple[PreTrainedModel, Workers | None, Rank | None]":
    """Return the model, or rank 0's shard of it with the workers; `undo` kills those."""
    processes = (config.processes or devices.count) if config.parallel == "tp" else 1
    device = hardware.device(devices)
    if processes == 1:
        if config.parallel is not None:
            log.warning("--parallel %s: one process, so the model is not divided", config.parallel)
        model = models.load(config.model, hardware=devices, device=device, quantization=config.quantization)
        return model, None, None
    check_settings(config.model_copy(update={"processes": processes}))
    import torch

    from runtime.serving.engine.model_runner import Rank
    from runtime.serving.engine.parallel import shard
    from runtime.serving.engine.parallel.workers import Workers

    source = config.model.model_copy(update={"path": models.locate(config.model)})
    model_config = models.load_config(source)
    own_shard = shard.Shard.of(model_config, 0, processes)
    threads = max(1, torch.get_num_threads() // processes)
    if devices.kind == "cpu":
        torch.set_num_threads(threads)
    workers = Workers(source, devices, world=processes, threads=threads)
    undo.callback(workers.kill)
    dtype = getattr(torch, hardware.compute_dtype(devices, source.dtype))
    model = shard.load(models.locate(source), model_config, own_shard, dtype=dtype, device=device)
    return model, workers, Rank(workers.connect(device), own_shard, workers.wait)


def add_adapter(
    served: ServedModel, source: AdapterSource, config: ServeConfig, *, access: oci.Access
) -> None:
    """Serve one adapter under its name, as `config` allows; blocks while it is pulled, checked and read.

    Raises ConfigError when it must not be loaded or the name is taken, RegistryError or TransientError
    when it cannot be pulled.
    """
    if source.name in served.models():
        raise ConfigError(f"the name '{source.name}' is taken; served are {', '.join(served.models())}")
    with adapters.local_copy(source.reference, access=access, name=source.name) as folder:
        attach(served, source.name, folder, config, strength=source.strength)
    log.info("Adapter added: %s", source.name)


def _refuse(served: ServedModel, source: AdapterSource, error: Exception) -> None:
    """Note that an adapter is not served, in one line: whatever is wrong with it, the others are."""
    reason = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {one_line(error)}"
    log.warning("Adapter refused: %s: %s", source.name, reason)
    if not isinstance(error, Failure):
        log.debug("Adapter %s: unexpected", source.name, exc_info=error)
    served.refused_adapters.append(source.name)


def _combined(served: ServedModel, config: ServeConfig, access: oci.Access) -> ServedModel:
    """Load all adapters, and their combination, which then answers for the base; log those refused."""
    with contextlib.ExitStack() as stack:
        parts: list[tuple[Path, float]] = []
        for source in config.adapters:
            try:
                copy = adapters.local_copy(source.reference, access=access, name=source.name)
                folder = stack.enter_context(copy)
                attach(served, source.name, folder, config, strength=source.strength)
            except Exception as error:
                _refuse(served, source, error)
                continue
            parts.append((folder, source.strength))
            log.info("Adapter added: %s", source.name)
        if not parts:
            return served
        scratch = stack.enter_context(temporary_folder("combined-"))
        adapters.combine(parts, scratch)
        served.engine.add_adapter(COMBINED, scratch)
    _combine_templates(served)
    log.info("Combined %d adapters: they answer requests that name none", len(parts))
    return replace(served, default_adapter=COMBINED)


def _combine_templates(served: ServedModel) -> None:
    """Give the combined adapter the chat template that all its parts have, if they have one of their own."""
    names = [name for name in served.engine.stats().adapters if name != COMBINED]
    own = [served.adapter_tokenizers.get(name) for name in names]
    if own[0] is not None and all(each is not None and each.same_template(own[0]) for each in own):
        served.adapter_tokenizers[COMBINED] = own[0]
    elif any(own):
        log.warning("The combined adapters have different chat templates: that of %s is used", served.name)


def attach(
    served: ServedModel, name: str, folder: Path, config: ServeConfig, *, strength: float = 1.0
) -> None:
    """Check an adapter and have the engine read it as `name`; it has its own chat template, if one is there.

    Raises ConfigError when it must not be served, CapacityError when there is no memory for it.
    """
    most_rank = config.max_lora_rank or (SOURCED_RANK if config.adapter_sources else None)
    adapters.check_served(folder, name=name, base=config.model.repository, most_rank=most_rank)
    adapters.check_tokens(folder, name, served.tokenizer.vocabulary)
    template = adapters.own_template(folder, name)
    served.adapter_tokenizers.pop(name, None)
    own = template is not None and not served.tokenizer.has_template(template)
    if template is not None and own:
        try:
            served.adapter_tokenizers[name] = served.tokenizer.with_template(template)
        except ConfigError as error:
            raise ConfigError(f"adapter {name}: {error}") from None
        served.form_for(name)
    try:
        served.engine.add_adapter(name, folder, strength=strength)
    except BaseException:
        served.adapter_tokenizers.pop(name, None)
        raise
    served.adapter_digests[name] = models.adapter_digest(folder, name)
    if not own:
        return
    base_has = "which differs from that of" if served.tokenizer.has_chat_template else "and there is none of"
    log.info("Adapter %s: requests for it use its own chat template, %s %s", name, base_has, served.name)


def _format(config: ServeConfig, model: "PreTrainedModel") -> str:
    if config.quantization is None:
        return str(model.dtype).removeprefix("torch.")
    kind = config.quantization.quant_type if config.quantization.bits == 4 else "int8"
    return f"{kind} computed in {str(model.dtype).removeprefix('torch.')}"


def _prompt_tokenizer(
    config: ServeConfig,
    generation_config: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    context_tokens: int,
) -> PromptTokenizer:
    try:
        prompts = PromptTokenizer(
            tokenizer,
            context_tokens=context_tokens,
            new_tokens=config.limits.new_tokens,
            stop_ids=models.end_ids(generation_config.get("eos_token_id"), tokenizer.eos_token_id),
            defaults=sampling_defaults(generation_config),
        )
    except ConfigError as error:
        raise ConfigError(
            f"{config.model.name}: {error}; --chat-template gives the model another one"
        ) from None
    prompts.start()
    return prompts
