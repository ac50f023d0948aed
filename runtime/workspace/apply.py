"""Lays the sections of training_config.yaml over a job's settings.

Knows which setting of ours each section's key is. Does not find the file (config_file.py) or check its keys
(sections.py). Start at `apply_training_config`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.config import describe
from runtime.errors import ConfigError
from runtime.tuning.arguments import lora, training
from runtime.tuning.data import formats
from runtime.workspace import sections
from runtime.workspace.base_model import Label, apply_model, put_dtype
from runtime.workspace.config_file import ConfigFile
from runtime.workspace.layers import LayeredSettings
from runtime.workspace.mounts import Mounts
from runtime.workspace.sections import DataCollator, DatasetConfig, QuantizationConfig, TrainingConfig


def apply_training_config(
    settings: LayeredSettings, config: TrainingConfig, file: ConfigFile, mounts: Mounts
) -> None:
    """Set everything in `config`, the checked content of `file`."""
    label = file.label
    apply_model(settings, config.model, label, mounts)
    _apply_quantization(settings, config.quantization, label)
    _apply_lora(settings, config, file)
    put_training(settings, config.training, f"{file.where}: TrainingArguments", label)
    _apply_dataset(settings, config.dataset, label)
    _apply_collator(settings, config.collator, label)


def _apply_quantization(settings: LayeredSettings, section: QuantizationConfig, label: Label) -> None:
    if section.quant_method not in (None, "bitsandbytes"):
        where = label("QuantizationConfig.quant_method")
        raise ConfigError(f"{where} is {describe(section.quant_method)}, expected bitsandbytes")
    if settings.get("method") == "lora":
        for key, value in section.model_dump(exclude={"quant_method"}).items():
            if value not in (None, False):
                where = label(f"QuantizationConfig.{key}")
                settings.warn(f"{where} has no effect: method lora trains on unquantised weights")
        settings.put("quantization", None, settings.sources["method"])
        return
    if section.load_in_8bit:
        settings.put("quantization.bits", 8, label("QuantizationConfig.load_in_8bit"))
    elif section.load_in_4bit:
        settings.put("quantization.bits", 4, label("QuantizationConfig.load_in_4bit"))
    renamed = {"bnb_4bit_quant_type": "quant_type", "bnb_4bit_use_double_quant": "double_quant"}
    for key, ours in renamed.items():
        if getattr(section, key) is not None:
            settings.put(f"quantization.{ours}", getattr(section, key), label(f"QuantizationConfig.{key}"))
    key = "bnb_4bit_compute_dtype"
    put_dtype(
        settings,
        "quantization.compute_dtype",
        section.bnb_4bit_compute_dtype,
        label(f"QuantizationConfig.{key}"),
    )
    _check_quantization(settings, section, label)
    for key in ("llm_int8_threshold", "llm_int8_skip_modules", "bnb_4bit_quant_storage"):
        if getattr(section, key) is not None:
            settings.put(
                f"quantization.options.{key}", getattr(section, key), label(f"QuantizationConfig.{key}")
            )


_QUANTIZATION_REFUSED = {
    "llm_int8_enable_fp32_cpu_offload": "every layer is on the device that trains it; use 4 bits",
    "llm_int8_has_fp16_weight": "the base model's weights are frozen; leave it out",
}


def _check_quantization(settings: LayeredSettings, section: QuantizationConfig, label: Label) -> None:
    for key, reason in _QUANTIZATION_REFUSED.items():
        if getattr(section, key):
            raise ConfigError(f"{label(f'QuantizationConfig.{key}')} cannot be used: {reason}")
    if section.load_in_4bit and section.llm_int8_threshold is not None:
        settings.warn(f"{label('QuantizationConfig.llm_int8_threshold')} has no effect: it is for 8 bits")


def _apply_lora(settings: LayeredSettings, config: TrainingConfig, file: ConfigFile) -> None:
    label = file.label
    shape, options = sections.lora_shape(config, file.where)
    renamed = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}
    for key, ours in renamed.items():
        value = lora.target_names(shape.target_modules) if key == "target_modules" else getattr(shape, key)
        if value is not None:
            settings.put(f"lora.{ours}", value, label(f"LoraConfig.{key}"))
    for key, value in options.items():
        settings.put(f"lora.options.{key}", value, label(f"LoraConfig.{key}"))
    for key, reason in lora.without_effect(config.lora).items():
        settings.warn(f"{label('LoraConfig.' + key)} has no effect here: {reason}")


def put_training(settings: LayeredSettings, given: Mapping[str, Any], where: str, label: Label) -> None:
    """Set the training arguments that are `given`, and warn of those without effect."""
    checked = training.check(given, where)
    folder = checked.pop("output_dir", None)
    if folder:
        settings.put("output.folder", folder, label("TrainingArguments.output_dir"))
    if training.is_sharded(checked.pop("fsdp", None), label("TrainingArguments.fsdp")):
        settings.put("parallel", "fsdp", label("TrainingArguments.fsdp"))
    for key, value in checked.items():
        settings.put(f"training.{key}", value, label(f"TrainingArguments.{key}"))
    for group, values in training.sft_settings(given, where).items():
        for key, value in values.items():
            settings.put(f"{group}.{key}", value, label("TrainingArguments"))
    for key, reason in training.without_effect(given, where):
        settings.warn(f"{label('TrainingArguments.' + key)} has no effect here: {reason}")


def _apply_dataset(settings: LayeredSettings, section: DatasetConfig, label: Label) -> None:
    renamed = {
        "shuffle_dataset": "shuffle", "shuffle_seed": "shuffle_seed", "context_column": "context_column",
        "response_column": "response_column", "messages_column": "messages_column",
        "train_test_split": "train_share",
    }  # fmt: skip
    for key, ours in renamed.items():
        if getattr(section, key) is not None:
            settings.put(f"data.{ours}", getattr(section, key), label(f"DatasetConfig.{key}"))
    if section.dataset_extension:
        where = label("DatasetConfig.dataset_extension")
        settings.put("data.extension", formats.named(section.dataset_extension, where), where)
    if section.dataset_path:
        path = Path(section.dataset_path)
        # A path that exists is what it is; of one that does not exist yet, a suffix makes a file.
        is_file = path.is_file() or (bool(path.suffix) and not path.is_dir())
        where = label("DatasetConfig.dataset_path")
        settings.put("data.file" if is_file else "data.folder", path, where)


def _apply_collator(settings: LayeredSettings, section: DataCollator, label: Label) -> None:
    """Warn of values without effect, except `mlm: true`, which every stock template holds, and defaults."""
    silent = {"mlm": (True, False), "mlm_probability": (0.15,), "return_tensors": ("pt",)}
    for key, value in section.model_dump().items():
        if value is not None and value not in silent.get(key, ()):
            settings.warn(f"{label('DataCollator.' + key)} has no effect here")
