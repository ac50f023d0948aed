"""LoRA adapters of the tiny model, made with plain peft."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from runtime import adapters
from runtime.model_source import ModelSource

SOURCE = ModelSource(name="tiny", repository="someone/tiny", revision="0" * 40)


def make(tiny_llama_dir: Path, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
    )
    adapters.save(get_peft_model(model, config), folder, source=SOURCE)
    return folder
