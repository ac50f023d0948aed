"""Which settings the sections of training_config.yaml become."""

from pathlib import Path

import pytest

from runtime.errors import ConfigError
from tests.workspace.documents import QLORA, SEED, STOCK, config_map, load, manifest, write


def test_stock_bfloat16_is_a_preference_and_a_warning_on_v100(tmp_path: Path) -> None:
    resolved = load(SEED, tmp_path, config=QLORA)
    assert resolved.config.model.dtype == "auto"
    assert resolved.config.quantization is not None
    assert resolved.config.quantization.compute_dtype == "auto"
    assert any("Standard_NC6s_v3" in warning and "float16" in warning for warning in resolved.warnings)


def test_own_dtype_is_kept(tmp_path: Path) -> None:
    file = write(
        tmp_path, manifest(), config_map(STOCK.replace('torch_dtype: "bfloat16"', "torch_dtype: float32"))
    )
    assert load(file, tmp_path).config.model.dtype == "float32"


def test_row_settings_of_trl_reach_the_encoding(tmp_path: Path) -> None:
    text = STOCK.replace("TrainingArguments:", "TrainingArguments:\n    max_length: 512\n    packing: true")
    job = load(write(tmp_path, manifest(), config_map(text)), tmp_path).config
    assert (job.encoding.max_tokens, job.encoding.batching) == (512, "packed")
    assert "max_length" not in job.training


@pytest.mark.parametrize(
    ("written", "parallel"),
    [("full_shard auto_wrap", "fsdp"), ("true", "fsdp"), ('""', "ddp"), ("false", "ddp"), ("null", "ddp")],
)
def test_trainers_fsdp_shards_the_base(tmp_path: Path, written: str, parallel: str) -> None:
    text = (
        "training_config:\n  QuantizationConfig: {load_in_4bit: true}\n"
        f"  TrainingArguments:\n    fsdp: {written}\n    fsdp_config: {{min_num_params: 1}}\n"
    )
    resolved = load(SEED, tmp_path, config=write(tmp_path, config_map(text)))
    assert resolved.config.parallel == parallel
    assert not {"fsdp", "fsdp_config"} & resolved.config.training.keys()
    assert any("fsdp_config.min_num_params has no effect here" in warning for warning in resolved.warnings)


def applied(tmp_path: Path, section: str, text: str, method: str = "qlora") -> tuple[str, ...]:
    """Return the warnings of a configuration with `text` in one section."""
    sections = {"QuantizationConfig": "load_in_4bit: true"} if method == "qlora" else {}
    sections[section] = f"{sections[section]}, {text}" if section in sections else text
    lines = "".join(f"  {name}: {{{written}}}\n" for name, written in sections.items())
    file = write(tmp_path, manifest(tuning__method=method), config_map(f"training_config:\n{lines}"))
    return load(file, tmp_path).warnings


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("ModelConfig", "device_map: {'': 0}"),
        ("ModelConfig", "output_loading_info: true"),
        ("ModelConfig", "resume_download: false"),
        ("ModelConfig", "cache_dir: /x"),
        ("LoraConfig", "revision: main"),
        ("LoraConfig", "base_model_name_or_path: x/y"),
        ("DataCollator", "mlm_probability: 0.3"),
        ("DataCollator", "return_tensors: np"),
    ],
)
def test_keys_without_effect_are_named(section: str, text: str, tmp_path: Path) -> None:
    key = text.partition(":")[0]
    assert any(
        f"{section}.{key} has no effect here" in warning for warning in applied(tmp_path, section, text)
    )


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (
            "ModelConfig",
            "device_map: auto, resume_download: true, output_loading_info: false, from_tf: false",
        ),
        ("ModelConfig", "trust_remote_code: , local_files_only: , device_map: "),
        ("QuantizationConfig", "quant_method: bitsandbytes, bnb_4bit_quant_type: "),
        ("LoraConfig", "task_type: CAUSAL_LM, peft_type: LORA, inference_mode: false, r: "),
        ("DataCollator", "mlm: true, mlm_probability: 0.15, return_tensors: pt"),
        ("TrainingArguments", "learning_rate: , max_steps: "),
    ],
)
def test_keys_that_ask_for_nothing_are_not(section: str, text: str, tmp_path: Path) -> None:
    assert not [warning for warning in applied(tmp_path, section, text) if "effect" in warning]


@pytest.mark.parametrize(
    ("section", "text", "message"),
    [
        ("ModelConfig", "from_tf: true", "ModelConfig.from_tf is true, but only safetensors"),
        ("QuantizationConfig", "quant_method: gptq", "quant_method is 'gptq', expected bitsandbytes"),
        ("LoraConfig", "task_type: SEQ_CLS", "LoraConfig.task_type is 'SEQ_CLS', expected CAUSAL_LM"),
        ("LoraConfig", "peft_type: IA3", "LoraConfig.peft_type is 'IA3', expected LORA"),
    ],
)
def test_another_kind_of_job_is_refused(section: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        applied(tmp_path, section, text)


def test_quantisation_that_method_lora_does_not_use_is_named(tmp_path: Path) -> None:
    text = "load_in_4bit: false, bnb_4bit_quant_type: nf4"
    (warning,) = [w for w in applied(tmp_path, "QuantizationConfig", text, "lora") if "effect" in w]
    assert "bnb_4bit_quant_type has no effect: method lora" in warning


def test_second_document_of_a_configuration_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"{STOCK}---\n{STOCK}")
    with pytest.raises(ConfigError, match="holds 2 documents, expected one"):
        load(SEED, tmp_path, config=config)
