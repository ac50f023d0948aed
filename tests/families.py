"""Small models of every family: a new family adds its line to TINY, and the tests of its readers run.

Start at `config_of`; VARIANTS are further configurations of families that more than one test needs.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from runtime import families

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "phi": {},
    "phi3": {"sliding_window": 16},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 16},
    "gemma3_text": {"head_dim": 32, "sliding_window": 16, "sliding_window_pattern": 2},
    "olmo2": {},
    "smollm3": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_neox": {"num_key_value_heads": 4},
    "opt": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 2,
        "word_embed_proj_dim": 64,
        "enable_bias": False,
    },
}
"""model_type: what its configuration has beside or instead of SIZES."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2, window in the upper layer": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    ),
    "phi-4-mini, partial rotation": ("phi3", {"partial_rotary_factor": 0.5}),
    "falcon, one key-value head": ("falcon", {"multi_query": True}),
    "falcon, all heads": ("falcon", {"multi_query": False}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama 3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2, yarn": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}},
    ),
}  # fmt: skip
"""Name: model_type, and what its configuration has instead of TINY's."""
SERVED = [name for name in TINY if families.find(name).engine is not None] + list(VARIANTS)
"""What the serving engine drives."""
PACKED = [name for name in TINY if families.find(name).packed]
"""What is tuned in packs."""

_SPELLED = {"falcon": {"intermediate_size": "ffn_hidden_size"}, "opt": {"intermediate_size": "ffn_dim"}}


def config_of(name: str, **changed: Any) -> Any:
    """Return the configuration of the family or variant `name`."""
    model_type, options = VARIANTS.get(name) or (name, TINY[name])
    spelled = _SPELLED.get(model_type, {})
    settings = {spelled.get(key, key): value for key, value in (SIZES | options | changed).items()}
    return AutoConfig.for_model(model_type, **settings)


def model_of(name: str, **changed: Any) -> Any:
    """Return a model of the family or variant `name`, its random weights so large that its answers vary."""
    torch.manual_seed(0)
    return vary(AutoModelForCausalLM.from_config(config_of(name, **changed)).eval())


def vary(model: Any) -> Any:
    """Return `model` with weights so large that its answers vary."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model
