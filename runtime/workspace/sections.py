"""training_config.yaml: the six sections, their keys and the controller's rules about them.

Knows what a user may write there, not which settings it becomes (apply.py). Start at `of` and `check`.
"""

from typing import Any, Literal

from pydantic import Field, field_validator

from runtime.config import Sparse, nearest, parse
from runtime.errors import ConfigError
from runtime.tuning.arguments import lora

KEY = "training_config.yaml"


class ModelConfig(Sparse):
    """How to read the base model."""

    pretrained_model_name_or_path: str | None = None
    revision: str | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    local_files_only: bool = False
    attn_implementation: str | None = None
    device_map: Any = None
    """Without effect, like all below: every process owns one device."""
    state_dict: Any = None
    cache_dir: Any = None
    force_download: Any = None
    proxies: Any = None
    output_loading_info: Any = None
    from_tf: Any = None
    resume_download: Any = None
    load_in_4bit: Any = None
    load_in_8bit: Any = None


MODEL_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "device_map": ("auto",),  # every process owns one device
    "state_dict": (),
    "cache_dir": (),
    "force_download": (False,),
    "proxies": (),
    "output_loading_info": (False,),
    "resume_download": (True,),  # downloads always resume
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
}
"""Keys of ModelConfig without effect, and the values that ask for nothing."""


class QuantizationConfig(Sparse):
    """bitsandbytes' settings; defaults are QLoRA's, not the library's."""

    quant_method: Any = None
    load_in_4bit: bool | None = None
    load_in_8bit: bool | None = None
    bnb_4bit_quant_type: str | None = None
    bnb_4bit_use_double_quant: bool | None = None
    bnb_4bit_compute_dtype: str | None = None
    bnb_4bit_quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] | None = None
    llm_int8_threshold: float | None = Field(None, ge=0, allow_inf_nan=False)
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool | None = None
    llm_int8_has_fp16_weight: bool | None = None


class LoraSection(Sparse):
    """The adapter's shape; the other keys of peft.LoraConfig are in tuning/arguments/lora.py."""

    r: int | None = Field(None, ge=1)
    lora_alpha: int | None = Field(None, ge=1)
    lora_dropout: float | None = Field(None, ge=0, lt=1)
    target_modules: str | list[str] | None = None


class DatasetConfig(Sparse):
    """Which rows, and from which columns."""

    dataset_path: str | None = None
    dataset_extension: str | None = None
    shuffle_dataset: bool | None = None
    shuffle_seed: int | None = Field(None, ge=0)
    context_column: str | None = None
    response_column: str | None = None
    messages_column: str | None = None
    train_test_split: float | None = Field(None, gt=0, le=1)


class DataCollator(Sparse):
    """Accepted because stock templates hold it; batches for a causal model have nothing to choose here."""

    tokenizer: Any = None
    mlm: Any = None
    mlm_probability: Any = None
    whole_word_mask: Any = None
    mask_replace_prob: Any = None
    random_replace_prob: Any = None
    pad_to_multiple_of: Any = None
    return_tensors: Any = None
    tf_experimental_compile: Any = None
    seed: Any = None


class TrainingConfig(Sparse):
    """The six sections. A section may be left out or empty."""

    model: ModelConfig = Field(ModelConfig(), alias="ModelConfig")
    quantization: QuantizationConfig = Field(QuantizationConfig(), alias="QuantizationConfig")
    lora: dict[str, Any] = Field({}, alias="LoraConfig")
    training: dict[str, Any] = Field({}, alias="TrainingArguments")
    dataset: DatasetConfig = Field(DatasetConfig(), alias="DatasetConfig")
    collator: DataCollator = Field(DataCollator(), alias="DataCollator")

    @field_validator("training")
    @classmethod
    def _output_dir(cls, training: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(training.get("output_dir", ""), str | None):
            raise ValueError("has an 'output_dir' that is no text, expected a directory")  # noqa: TRY004 - pydantic wants it
        return training


SECTIONS = tuple(str(field.alias) for field in TrainingConfig.model_fields.values())


def of(document: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the sections below `training_config` in the content of a file, without empty ones."""
    if list(document) != ["training_config"]:
        wrong = next((key for key in document if key != "training_config"), None)
        hint = nearest(str(wrong), ["training_config", *SECTIONS]) if wrong else ""
        raise ConfigError(
            f"{where}: expected the one key 'training_config', found '{wrong or 'nothing'}'{hint}"
        )
    sections = document["training_config"]
    if not isinstance(sections, dict):
        raise ConfigError(f"{where}: 'training_config' must hold the sections {', '.join(SECTIONS)}")
    return {name: section for name, section in sections.items() if section is not None}


def check(raw: dict[str, Any], where: str, method: str | None) -> TrainingConfig:
    """Return the parsed sections, checked by the controller's rules for `method`."""
    config = parse(TrainingConfig, raw, where)
    for key in config.lora:
        if key not in lora.KEYS | LoraSection.model_fields.keys():
            hint = nearest(key, lora.KEYS | LoraSection.model_fields.keys())
            raise ConfigError(
                f"{where}: unknown key 'LoraConfig.{key}'{hint or '; expected a peft.LoraConfig one'}"
            )
    four, eight = config.quantization.load_in_4bit, config.quantization.load_in_8bit
    if four and eight:
        raise ConfigError(
            f"{where}: QuantizationConfig has both 'load_in_4bit' and 'load_in_8bit' true, "
            "expected one of them"
        )
    if method == "lora" and (four or eight):
        raise ConfigError(
            f"{where}: method lora trains on unquantised weights, but QuantizationConfig has "
            f"'load_in_{4 if four else 8}bit: true'; set it to false or use method qlora"
        )
    if method == "qlora" and not (four or eight):
        raise ConfigError(
            f"{where}: method qlora needs 'load_in_4bit: true' or 'load_in_8bit: true' in QuantizationConfig"
        )
    return config


def lora_shape(config: TrainingConfig, where: str) -> tuple[LoraSection, dict[str, Any]]:
    """Return the adapter's shape and the further peft.LoraConfig arguments."""
    own = {key: value for key, value in config.lora.items() if key in LoraSection.model_fields}
    options = lora.read_options(config.lora, where)
    return parse(LoraSection, own, f"{where}: LoraConfig"), options
