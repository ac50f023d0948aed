"""Small models with random weights, one per family that the batching engine runs, and prompts."""

import random
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "mistral, sliding window": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, window in the upper layer": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "phi-3, sliding window": ("Phi3Config", {"sliding_window": 16}),
    "phi-4-mini, partial rotation": ("Phi3Config", {"partial_rotary_factor": 0.5}),
    "phi-2": ("PhiConfig", {}),
    "falcon, one key-value head": ("FalconConfig", {"multi_query": True}),
    "falcon, groups": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, all heads": ("FalconConfig", {"multi_query": False}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma 2, soft caps and windows": ("Gemma2Config", {"head_dim": 32, "sliding_window": 16}),
    "llama, linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama, dynamic": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama 3": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2, yarn": (
        "Qwen2Config",
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}},
    ),
    "gemma 3, windows": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 16}),
}


def some_prompts(*lengths: int, vocabulary: int = 128) -> list[tuple[int, ...]]:
    draw = random.Random(1)
    return [tuple(draw.randrange(3, vocabulary) for _ in range(length)) for length in lengths]


def model_of(family: str) -> Any:
    """Return a small model of `family` with random weights, large enough that its answers vary."""
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    return vary(AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES, **options)).eval())


def longrope_model() -> Any:
    """Phi-4-mini's shape, 64 positions in its youth and 512 now; both sets of factors change its answers."""
    torch.manual_seed(0)
    draw = torch.rand(2, 4).tolist()
    rope = {
        "rope_type": "longrope", "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64,
        "short_factor": [1 + x for x in draw[0]], "long_factor": [2 + 6 * x for x in draw[1]],
    }  # fmt: skip
    config = transformers.Phi3Config(**SIZES, original_max_position_embeddings=64, rope_parameters=rope)
    return vary(AutoModelForCausalLM.from_config(config).eval())


def vary(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model
