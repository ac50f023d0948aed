"""Adapters that change every answer, made once."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from runtime import adapters
from runtime.model_source import ModelSource

from .asking import load

SOURCE = ModelSource(name="tiny", repository="someone/tiny")


@pytest.fixture(scope="session")
def adapter_dirs(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of different rank and targets, with weights that change every answer."""
    made = {}
    for seed, (name, rank, targets) in enumerate(
        [("my.first-one", 4, ["q_proj", "v_proj"]), ("second", 8, ["gate_proj", "down_proj", "o_proj"])]
    ):
        torch.manual_seed(seed)
        model = get_peft_model(
            load(tiny_llama_dir), LoraConfig(r=rank, lora_alpha=32, target_modules=targets)
        )
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        made[name] = tmp_path_factory.mktemp("adapters") / name
        adapters.save(model, made[name], source=SOURCE)
    return made
