"""Weights and caches of public models, counted without storage and held to what their makers state."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.memory import counting, shape
from runtime.memory.counting import CacheSize
from tests.memory.configurations import BYTES_PER_TOKEN, CONFIGURATIONS, PUBLISHED

PLAIN: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "qwen2": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
    "phi3": {
        "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True, "pad_token_id": 0,
    },
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    },
    "gemma3_text": {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    },
    "smollm3": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    "olmo2": {
        "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
    },
    "glm4": {
        "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": False,
    },
    "gpt_neox": {
        "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
        "num_attention_heads": 64,
    },
}  # fmt: skip
"""Public dimensions of families whose layers are alike."""


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_weights_and_cache_of_experts_latent_attention_and_hybrids(name: str) -> None:
    counted = counting.measure(CONFIGURATIONS[name])
    assert counted.parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)
    assert counted.cache is not None
    assert 2 * counted.cache.token == BYTES_PER_TOKEN[name]
    linear = sum(it.copies * it.inputs * it.outputs for it in counted.linears)
    assert 0 < linear < counted.parameters


@pytest.mark.parametrize("kind", PLAIN)
def test_arithmetic_agrees_with_transformers_where_layers_are_alike(kind: str, tmp_path: Path) -> None:
    config = {"model_type": kind, "max_position_embeddings": 4096, **PLAIN[kind]}
    found = shape.read(written(tmp_path, config), name=kind)
    assert found.counts is None
    counted = counting.measure(config)
    assert found.parameters == pytest.approx(counted.parameters, rel=0.01)
    linear = sum(it.copies * it.inputs * it.outputs for it in counted.linears)
    assert found.linear_parameters == linear
    assert counted.cache is not None
    sizes = [(size.token + size.window_token, size.sequence) for size in (found.cache, counted.cache)]
    assert sizes[0] == sizes[1]
    if "sliding_window" in config:
        assert found.cache == counted.cache


def test_states_and_windows_count_by_the_length_of_a_sequence() -> None:
    size = CacheSize(token=10, window_token=5, window=100, sequence=7)
    assert [size.values(tokens) for tokens in (0, 1, 100, 1000)] == [7, 22, 1507, 10507]
    olmo = counting.measure(CONFIGURATIONS["Olmo-3-7B"]).cache
    assert olmo is not None
    assert (olmo.window, olmo.window_token) == (4096, 3 * olmo.token)
    hybrid = counting.measure(CONFIGURATIONS["Qwen3-Next-80B-A3B"]).cache
    assert hybrid is not None
    assert hybrid.sequence == 36 * (32 * 128 * 128 + 8192 * 4)


def test_a_configuration_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: transformers builds no model.*unheard_of"):
        shape.read(written(tmp_path, {"model_type": "unheard_of"}), name="m")


def test_the_process_counts_and_the_caller_imports_no_torch(tmp_path: Path) -> None:
    config = {**CONFIGURATIONS["gpt-oss-20b"], "num_hidden_layers": 2}
    file = written(tmp_path, config)
    code = (
        "import sys; from pathlib import Path; from runtime.memory import shape; "
        f"found = shape.read(Path({str(file)!r}), name='m'); "
        "print(found.parameters, found.quantized, found.files_known, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(counting.measure(config).parameters), "mxfp4", "False", "False"]
