"""The base model: its LoRA targets by architecture, gated repositories."""

from pathlib import Path

import pytest

from runtime.workspace import load_server
from tests.workspace.documents import STOCK, load, manifest, write

SPLIT = "k_proj,q_proj,v_proj,o_proj,gate_proj,down_proj,up_proj"


@pytest.mark.parametrize("target", [None, "phi-3-mini-4k-instruct"])
def test_split_targets_of_phi_3_become_its_fused_ones(target: str | None, pod: Path) -> None:
    resolved = load(target, pod, environ={"DEFAULT_TARGET_MODULES": SPLIT})
    assert set(resolved.config.lora.targets) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert any("qkv_proj" in warning and "k_proj" in warning for warning in resolved.warnings)


def test_users_own_targets_win_over_the_environment(pod: Path) -> None:
    (pod / "mnt/config/training_config.yaml").write_text(
        STOCK.replace("r: 8", "r: 8\n    target_modules: [qkv_proj]")
    )
    resolved = load(None, pod, environ={"DEFAULT_TARGET_MODULES": SPLIT})
    assert resolved.config.lora.targets == ("qkv_proj",)
    assert not any("qkv_proj" in warning for warning in resolved.warnings)


def test_split_targets_stay_where_the_model_has_them(pod: Path) -> None:
    resolved = load("qwen2.5-coder-7b-instruct", pod, environ={"DEFAULT_TARGET_MODULES": SPLIT})
    assert resolved.config.lora.targets == tuple(SPLIT.split(","))


@pytest.mark.parametrize(("environ", "warned"), [({}, True), ({"HF_TOKEN": "hf_x"}, False)])
def test_gated_model_without_a_token_is_warned_of(
    environ: dict[str, str], warned: bool, tmp_path: Path
) -> None:
    file = write(tmp_path, manifest(tuning__preset__name="llama-3.1-8b-instruct"))
    for resolved in (
        load(file, tmp_path, environ=environ),
        load_server("llama-3.1-8b-instruct", environ=environ, root=tmp_path),
    ):
        assert any("is gated" in warning for warning in resolved.warnings) is warned
