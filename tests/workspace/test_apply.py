"""Which settings the sections of training_config.yaml become."""

from pathlib import Path

import pytest

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
    assert any("fsdp_config has no effect here" in warning for warning in resolved.warnings)
