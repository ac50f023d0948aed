"""Merges a base model and an adapter into one model directory that needs neither peft nor this project.

The base is read as it is stored, in 16 bits, never quantised: an update added to 4-bit weights would be
rounded away. Does not know tuning or serving. Start at `merge`.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from runtime import adapters, logs, model_files, models, presets
from runtime.adapters import Adapter, lora_config
from runtime.config import read_text
from runtime.errors import CapacityError, ConfigError, one_line
from runtime.files import atomic_folder, check_folder, disk_errors, sampled_sha256, sha256
from runtime.hardware import Hardware
from runtime.memory.shape import BYTES
from runtime.model_source import Dtype, ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ORIGIN = ".merged.json"
"""In a merged model: what it was made of. A command that is run again knows its result by it."""

_PEFT_FAILS = (
    RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError,
)  # fmt: skip
"""What peft raises for configurations and weights that do not fit; they come from outside."""


def base_of(folder: Path, model: str | None = None) -> ModelSource:
    """Return the base model of the adapter in `folder`: `model`, else what its config names.

    Raises ConfigError when the adapter must not be loaded, or belongs to another base.
    """
    if model is not None:
        source = presets.source(model)
        adapters.check(folder, base=source.repository)
        return source
    adapter = adapters.check(folder)
    if adapter.base is None:
        raise ConfigError(f"adapter {folder.name} names no base model; give --model")
    revision = json.loads(read_text(folder / adapters.CONFIG_FILE)).get("revision")
    source = presets.source(adapter.base)
    return source.model_copy(update={"revision": revision}) if revision else source


def merge(folder: Path, target: Path, *, base: ModelSource, machine: Hardware, dtype: Dtype = "auto") -> Path:
    """Write `base` with the adapter in `folder` added to it to the new directory `target`; return `target`.

    The directory appears complete or not at all, and stays where it holds the same merged model already.
    `dtype` is that of the written weights; "auto" keeps that of the base. Raises ConfigError when `target` is
    taken or the base is quantised, CapacityError without enough memory.
    """
    check_folder(target, "a new directory for the model")
    is_taken = target.is_dir() and any(target.iterdir())
    if is_taken and not (target / ORIGIN).is_file():
        raise _taken(target)
    adapter = adapters.check(folder)
    if reasons := lora_config.not_merged(adapter.config):
        raise ConfigError(f"adapter {folder.name}: cannot be merged: {'; '.join(reasons)}")
    weights = models.locate(base)
    origin = _origin(adapter, weights, dtype)
    if is_taken:
        if read_text(target / ORIGIN) != origin:
            raise _taken(target)
        log.info("%s holds this merged model already", target)
        return target
    stored = _stored_dtype(base, weights)
    written = stored if dtype == "auto" else dtype
    _check_memory(base, weights, BYTES[written] / BYTES[stored], machine)
    merged = _merged(base.model_copy(update={"path": weights, "dtype": written}), adapter, machine)
    with disk_errors(target), atomic_folder(target) as scratch, logs.quiet_progress():
        merged.save_pretrained(str(scratch))
        _save_tokenizer(base, folder, scratch, embeddings=len(_embeddings(merged)))
        (scratch / ORIGIN).write_text(origin, encoding="utf-8")
    log.info("merged adapter %s and %s (%s) into %s, %s", folder.name, base.name, weights, target, written)
    return target


def _taken(target: Path) -> ConfigError:
    return ConfigError(f"{target} exists already; give a new directory")


def _origin(adapter: Adapter, weights: Path, dtype: Dtype) -> str:
    """Return what a merged model is made of, as its folder records it."""
    digests = {path.name: sha256(path) for path in sorted(adapter.folder.iterdir()) if path.is_file()}
    base = {path.name: sampled_sha256(path) for path in sorted(weights.iterdir()) if path.is_file()}
    return json.dumps({"adapter": digests, "base": base, "dtype": dtype}, indent=1)


def _merged(base: ModelSource, adapter: Adapter, machine: Hardware) -> "PreTrainedModel":
    """Return the base with the adapter's update added to its weights, computed in float32.

    peft carries out what the adapter's LoraConfig asks for. Raises ConfigError where it cannot, or where a
    part of the adapter would be left out.
    """
    from peft import PeftModel

    model: Any = models.load(base, hardware=machine, device="cpu")
    try:
        _check_patterns(adapter, [name for name, _ in model.named_modules()])
        _resize(model, adapter)
        with warnings.catch_warnings():  # peft 0.21 still reads a property that transformers 5.23 renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            adapted = PeftModel.from_pretrained(model, str(adapter.folder), autocast_adapter_dtype=True)
        _check_whole(adapter, adapted)
        _untie(adapted)
        merged = adapted.merge_and_unload(safe_merge=True)
    except _PEFT_FAILS as error:
        what = one_line(error, 300) or type(error).__name__
        raise ConfigError(f"adapter {adapter.name} does not fit {base.name}: {what}") from None
    return cast("PreTrainedModel", merged)


def _check_patterns(adapter: Adapter, paths: list[str]) -> None:
    """Raise ConfigError for patterns that cannot be read, or not in time: peft would take for ever."""
    try:
        found = sorted(lora_config.targeted(adapter.fields, paths))
        lora_config.scalings(adapter.fields, lora_config.ranks(adapter.fields, found))
    except ConfigError as error:
        raise ConfigError(f"adapter {adapter.name}: {error}") from None


def _resize(model: Any, adapter: Adapter) -> None:
    """Give the model as many embeddings as the adapter brings, where it was trained with further tokens."""
    name = next(name for name, each in model.named_modules() if each is model.get_input_embeddings())
    rows = adapter.shapes.get(f"{name}.weight", (0,))[0]
    if rows > len(_embeddings(model)):
        model.resize_token_embeddings(rows, mean_resizing=False)


def _check_whole(adapter: Adapter, adapted: Any) -> None:
    """Raise ConfigError for tensors of the adapter that peft did not load, or did not find."""
    from peft import get_peft_model_state_dict

    needed, known = (
        {
            name.removeprefix(lora_config.PREFIX)
            for name in get_peft_model_state_dict(adapted, save_embedding_layers=embeddings)
        }
        for embeddings in (False, True)
    )
    for names, what in (
        (adapter.shapes.keys() - known, "belong to nothing that"),
        (needed - adapter.shapes.keys(), "are missing that"),
    ):
        if names:
            raise ConfigError(
                f"adapter {adapter.name}: {len(names)} tensors {what} its {adapters.CONFIG_FILE} adapts in "
                f"this model, {min(names)} first"
            )


def _embeddings(model: Any) -> Any:
    return model.get_input_embeddings().weight


def _untie(adapted: Any) -> None:
    """Give the output layer weights of its own, where it shares them and one of the two is adapted."""
    import torch
    from peft.tuners.lora import LoraLayer

    model: Any = adapted.get_base_model()
    shared = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(layer, LoraLayer) for layer in shared):
        return
    inner: Any
    outer: Any
    inner, outer = (layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in shared)
    if inner.weight is outer.weight:
        outer.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _stored_dtype(base: ModelSource, weights: Path) -> Dtype:
    """Return the type the base's files are in; ConfigError when they are quantised."""
    config = model_files.read_config(weights / "config.json")
    text = config.get("text_config") or {}
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(f"{base.name} is quantised ({method}): give its 16-bit original with --model")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32")
    return cast("Dtype", dtype) if dtype in BYTES else "float32"


def _check_memory(base: ModelSource, weights: Path, growth: float, machine: Hardware) -> None:
    """Refuse before half an hour of reading when the weights, times `growth`, exceed the memory."""
    if machine.kind != "cpu":
        return
    size = sum(path.stat().st_size for path in weights.glob("*.safetensors"))
    needed = int(size * growth)
    if needed > machine.memory_bytes:
        raise CapacityError(
            f"merging {base.name} takes {needed / 2**30:.1f} GiB of memory and "
            f"{machine.memory_bytes / 2**30:.1f} are there; use a larger machine, or --dtype bfloat16"
        )


def _save_tokenizer(base: ModelSource, folder: Path, scratch: Path, *, embeddings: int) -> None:
    """Write the adapter's tokenizer and chat template if it has them, else the base's.

    ConfigError for tokens that the base has not, beyond the merged model's `embeddings`.
    """
    tokenizer: Any = models.load_tokenizer(base)
    if (folder / "tokenizer_config.json").is_file():
        own = models.load_tokenizer(base, files=folder)
        if len(own) > max(embeddings, len(tokenizer)):
            raise ConfigError(
                f"adapter {folder.name}: its tokenizer has {len(own)} tokens, the model {embeddings}"
            )
        tokenizer = own
    template = adapters.own_template(folder, folder.name)
    if template is not None:
        tokenizer.chat_template = template
    models.save_tokenizer(tokenizer, scratch)
