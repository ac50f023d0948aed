"""Public dimensions of models whose layers are not all alike, as their config.json state them."""

from typing import Any

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "max_position_embeddings": 40960,
        "tie_word_embeddings": False, "mlp_only_layers": [], "decoder_sparse_step": 1,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "vocab_size": 102400, "max_position_embeddings": 163840, "n_group": 1,
        "topk_group": 1, "topk_method": "greedy", "tie_word_embeddings": False,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840, "n_group": 8,
        "topk_group": 4, "tie_word_embeddings": False, "quantization_config": {"quant_method": "fp8"},
    },
    "Qwen3-Next-80B-A3B": {
        "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5120, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "num_experts": 512, "num_experts_per_tok": 10,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "vocab_size": 151936,
        "full_attention_interval": 4, "max_position_embeddings": 262144, "tie_word_embeddings": False,
    },
    "Granite-4.0-H-Tiny": {
        "model_type": "granitemoehybrid", "hidden_size": 1536, "num_hidden_layers": 40,
        "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 512,
        "shared_intermediate_size": 1024, "num_local_experts": 64, "num_experts_per_tok": 6,
        "layer_types": ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)],
        "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
        "mamba_n_heads": 48, "vocab_size": 100352, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "Nemotron-Nano-9B-v2": {
        "model_type": "nemotron_h", "hidden_size": 4480, "num_hidden_layers": 56, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 15680, "mamba_num_heads": 128,
        "mamba_head_dim": 80, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "vocab_size": 131072,
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "Jamba-v0.1": {
        "model_type": "jamba", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "num_experts": 16, "num_experts_per_tok": 2,
        "attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256, "vocab_size": 65536,
        "max_position_embeddings": 262144, "tie_word_embeddings": False,
    },
    "Falcon-H1-7B": {
        "model_type": "falcon_h1", "hidden_size": 3072, "num_hidden_layers": 44, "num_attention_heads": 12,
        "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 12288, "mamba_d_ssm": 3072,
        "mamba_n_heads": 24, "mamba_d_head": 128, "mamba_n_groups": 1, "mamba_d_state": 256,
        "mamba_d_conv": 4, "mamba_expand": 2, "vocab_size": 130048, "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    },
    "LFM2-1.2B": {
        "model_type": "lfm2", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "block_ff_dim": 12288, "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True, "conv_L_cache": 3,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14], "vocab_size": 65536, "max_position_embeddings": 128000,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32,
        "num_experts_per_tok": 4, "sliding_window": 128, "vocab_size": 201088,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "Olmo-3-7B": {
        "model_type": "olmo3", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11008, "sliding_window": 4096, "vocab_size": 100278,
        "max_position_embeddings": 65536, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Repository's name: its configuration."""
PUBLISHED = {
    "Qwen3-30B-A3B": 30.5, "Mixtral-8x7B": 46.7, "DeepSeek-V2-Lite": 15.7, "DeepSeek-V3": 671,
    "Qwen3-Next-80B-A3B": 80, "Granite-4.0-H-Tiny": 6.9, "Nemotron-Nano-9B-v2": 8.89, "Jamba-v0.1": 51.6,
    "Falcon-H1-7B": 7.6, "LFM2-1.2B": 1.17, "gpt-oss-20b": 20.9, "Olmo-3-7B": 7.3,
}  # fmt: skip
"""Billions of weights, as their makers state them."""
BYTES_PER_TOKEN = {
    "Qwen3-30B-A3B": 2 * 2 * 48 * 4 * 128,
    "Mixtral-8x7B": 2 * 2 * 32 * 8 * 128,
    "DeepSeek-V2-Lite": 2 * 27 * (512 + 64),
    "DeepSeek-V3": 70272,  # in KAITO's table too
    "Qwen3-Next-80B-A3B": 2 * 2 * 12 * 2 * 256,
    "Granite-4.0-H-Tiny": 2 * 2 * 4 * 4 * 128,
    "Nemotron-Nano-9B-v2": 2 * 2 * 4 * 8 * 128,
    "Jamba-v0.1": 2 * 2 * 4 * 8 * 128,
    "Falcon-H1-7B": 2 * 2 * 44 * 2 * 128,
    "LFM2-1.2B": 2 * 2 * 6 * 8 * 64,
    "gpt-oss-20b": 2 * 2 * 12 * 8 * 64,
    "Olmo-3-7B": 2 * 2 * 8 * 32 * 128,
}
"""Keys and values of one token in 16 bits, in the layers that keep every token."""
