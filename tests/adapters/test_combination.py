"""An adapter that is the sum of others: exact, and loadable in plain peft."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runtime import adapters
from runtime.errors import ConfigError
from tests.adapters.made import SOURCE, make


def _updates(folder: Path) -> dict[str, torch.Tensor]:
    """Return each layer's whole update, as plain peft computes it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(str(folder / "adapter_model.safetensors"))
    layers = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    return {
        name: scale * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"] for name in layers
    }


def test_combined_adapter_does_what_its_parts_do_together(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Different ranks, targets, scalings and strengths; exact, and plain peft loads it."""
    one = make(tiny_llama_dir, tmp_path / "one", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    other = get_peft_model(
        model,
        LoraConfig(
            r=2, lora_alpha=3, use_rslora=True, target_modules=["v_proj", "up_proj"], init_lora_weights=False
        ),
    )
    adapters.save(other, tmp_path / "two", source=SOURCE)
    adapters.combine([(one, 0.5), (tmp_path / "two", 1.0)], tmp_path / "both")
    assert adapters.check(tmp_path / "both").rank == 6
    both, first, second = _updates(tmp_path / "both"), _updates(one), _updates(tmp_path / "two")
    assert both.keys() == first.keys() | second.keys()
    for name, update in both.items():
        expected = 0.5 * first.get(name, torch.zeros_like(update)) + second.get(
            name, torch.zeros_like(update)
        )
        torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-6)
    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir)), str(tmp_path / "both")
    )


def test_adapters_that_do_not_add_up_are_not_combined(tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole = make(tiny_llama_dir, tmp_path / "whole")
    dora = make(tiny_llama_dir, tmp_path / "dora", use_dora=True)
    with pytest.raises(ConfigError, match="adapter dora: cannot be served as an adapter: use_dora"):
        adapters.combine([(whole, 1.0), (dora, 1.0)], tmp_path / "both")
    assert not (tmp_path / "both").exists()
