"""Merges a base model and an adapter into one model directory that needs neither peft nor this project.

The base is read as it is stored, in 16 bits, never quantised: an update added to 4-bit weights would be
rounded away. Does not know tuning or serving. Start at `merge`.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from runtime import adapters, logs, models, presets
from runtime.config import read_text
from runtime.errors import CapacityError, ConfigError, one_line
from runtime.files import atomic_folder, check_folder, disk_errors
from runtime.hardware import Hardware
from runtime.memory.shape import BYTES
from runtime.model_source import Dtype, ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


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

    The directory appears complete or not at all. `dtype` is that of the written weights; "auto" keeps that
    of the base. Raises ConfigError when `target` is taken or the base is quantised, CapacityError without
    enough memory.
    """
    check_folder(target, "a new directory for the model")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} exists already; give a new directory")
    weights = models.locate(base)
    stored = _stored_dtype(base, weights)
    written = stored if dtype == "auto" else dtype
    _check_memory(base, weights, BYTES[written] / BYTES[stored], machine)
    merged = _merged(base.model_copy(update={"path": weights, "dtype": written}), folder, machine)
    with disk_errors(target), atomic_folder(target) as scratch, logs.quiet_progress():
        merged.save_pretrained(str(scratch))
        _save_tokenizer(base, folder, scratch)
    log.info("merged adapter %s and %s (%s) into %s, %s", folder.name, base.name, weights, target, written)
    return target


def _merged(base: ModelSource, folder: Path, machine: Hardware) -> "PreTrainedModel":
    """Return the base with the adapter's update added to its weights, computed in float32."""
    from peft import PeftModel

    model: Any = models.load(base, hardware=machine, device="cpu")
    try:
        with warnings.catch_warnings():  # peft 0.21 still reads a property that transformers 5.23 renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            adapted = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=True)
    except (RuntimeError, ValueError) as error:
        what = one_line(error)
        raise ConfigError(f"adapter {folder.name} does not fit {base.name}: {what}") from None
    return cast("PreTrainedModel", adapted.merge_and_unload(safe_merge=True))


def _stored_dtype(base: ModelSource, weights: Path) -> Dtype:
    """Return the type the base's files are in; ConfigError when they are quantised."""
    config = json.loads(read_text(weights / "config.json"))
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


def _save_tokenizer(base: ModelSource, folder: Path, scratch: Path) -> None:
    """Write the adapter's tokenizer and chat template if it has them, else the base's."""
    own = (folder / "tokenizer_config.json").is_file()
    models.save_tokenizer(models.load_tokenizer(base, files=folder if own else None), scratch)
