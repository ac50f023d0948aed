"""Models with random weights: of Phi-3-mini's shape for speed, small ones of three families for correctness.

Start at `build` (on the device) and `saved` (on disk, written once a run).
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from tests.bench.gpu.step import Context
from tests.conftest import write_tiny_tokenizer
from tests.families import config_of

CONTEXT_TOKENS = 4096
SHAPES: dict[str, dict[str, int]] = {
    "phi-3-mini": {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
}  # fmt: skip
TINY = ("phi3", "llama", "longrope")
ORIGINAL_TOKENS = 64
"""Positions from which the longrope model has its other factors."""

WEIGHT_STD = 0.06
"""Of the small models. bfloat16 alone then moves their gradients by 1.0 %, and rotary factors of the wrong
context by 26 %; with weights of 0.1 by 1.9 and 84 % (measured on a CPU)."""


def config(context: Context) -> Any:
    """Return the configuration of the model whose speed is measured."""
    return Phi3Config(
        **SHAPES[context.shape], max_position_embeddings=CONTEXT_TOKENS, pad_token_id=0, eos_token_id=2
    )


def build(context: Context, configuration: Any | None = None) -> Any:
    """Return a model on the device, in the compute type that the runtime chooses there."""
    torch.manual_seed(0)
    with torch.device(context.device):
        model = AutoModelForCausalLM.from_config(configuration or config(context), dtype=context.dtype)
    return model.eval().requires_grad_(False)


def without_weights(context: Context) -> Any:
    """Return the model of `build` with shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(context), dtype=context.dtype)


def saved(context: Context) -> Path:
    """Return the folder of the model of `build`, with a tokenizer; written by the step that first asks."""
    folder = context.scratch / "model"
    if not (folder / "complete").exists():
        model = build(context)
        model.save_pretrained(str(folder), max_shard_size="2GB")
        write_tiny_tokenizer(folder)
        (folder / "complete").touch()
        del model
        context.release()
    return folder


def grouped_config(context: Context) -> Any:
    """Return a Llama with fewer key-value heads than heads, for long contexts."""
    sizes = (
        {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        if context.is_tiny else
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    )  # fmt: skip
    return LlamaConfig(
        vocab_size=512, num_hidden_layers=2, max_position_embeddings=32768, pad_token_id=0, eos_token_id=2,
        **sizes,
    )  # fmt: skip


def tiny(name: str) -> Any:
    """Return one of TINY on the CPU in float32."""
    if name != "longrope":
        configuration = config_of(name)
    else:
        rope = {
            "rope_type": "longrope", "original_max_position_embeddings": ORIGINAL_TOKENS,
            "short_factor": [1 + number / 8 for number in range(8)],
            "long_factor": [2 + number / 2 for number in range(8)],
        }  # fmt: skip
        configuration = config_of(
            "phi3", rope_parameters=rope, original_max_position_embeddings=ORIGINAL_TOKENS
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    return model
