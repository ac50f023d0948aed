"""Which engine a model gets, and how many sequences of which length fit beside it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM

from runtime import families
from runtime.errors import CapacityError
from runtime.memory import serving
from runtime.model_source import ModelSource
from runtime.serving.engine.backends.simple import SimpleEngine
from runtime.serving.engine.create import create, within_share
from runtime.serving.engine.engine import BatchingEngine
from runtime.serving.engine.patch import refusal
from runtime.serving.settings import Limits, ServeConfig
from tests.serving.engine.calls import generate, load, make_request, run


def config(**limits: Any) -> ServeConfig:
    return ServeConfig(model=ModelSource(name="tiny"), served_name="tiny", limits=Limits(**limits))


def test_a_known_architecture_gets_the_batching_engine(tiny_llama_dir: Path) -> None:
    made = create(config(rows=3, context_tokens=300), load(tiny_llama_dir))
    assert isinstance(made, BatchingEngine)
    assert made.context_tokens == 300
    made.close()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GPT2Config", {"n_embd": 64, "n_layer": 2, "vocab_size": 512}),
        (
            "FalconConfig",
            {"alibi": True, "hidden_size": 64, "num_hidden_layers": 2},
        ),
    ],
)
def test_an_unknown_architecture_is_served_one_at_a_time_with_a_warning(
    kind: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**options, num_attention_heads=4, eos_token_id=2)
    ).eval()
    with caplog.at_level(logging.WARNING):
        made = create(config(), model)
    assert isinstance(made, SimpleEngine)
    assert "Serving one request at a time" in caplog.text
    assert run(made, make_request())[0][0] == generate(model)
    made.close()


SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
}  # fmt: skip


def test_a_longrope_model_gets_its_full_context() -> None:
    phi = transformers.Phi3Config(**SHAPE, original_max_position_embeddings=128, rope_parameters=LONGROPE)
    made = create(config(rows=2), AutoModelForCausalLM.from_config(phi).eval())
    assert isinstance(made, BatchingEngine)
    assert made.context_tokens == 512
    made.close()


def test_a_longrope_model_served_one_at_a_time_gets_its_original_context(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(families.FAMILIES, "phi3")  # type: ignore[arg-type]
    phi = transformers.Phi3Config(**SHAPE, original_max_position_embeddings=128, rope_parameters=LONGROPE)
    made = create(config(), AutoModelForCausalLM.from_config(phi).eval())
    assert made.context_tokens == 128
    assert "Serving 128 of 512 context tokens: longrope needs the batching engine" in caplog.text
    made.close()


def test_a_rope_type_that_was_never_tested_is_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE))
    assert refusal(model) is None
    model.config.rope_parameters["rope_type"] = "proportional"
    assert refusal(model) == "rope type 'proportional' is not one it knows"


@pytest.mark.parametrize(
    ("wanted", "free_tokens", "expected"),
    [
        ((32, 4096), 32 * 4096, (32, 4096)),
        ((32, 4096), 32 * 3000, (32, 3000)),  # context gives way first
        ((32, 4096), 10 * 2048, (10, 2048)),  # then sequences
        ((32, 1024), 10 * 1024, (10, 1024)),  # a stated context below the floor is kept
        ((32, 4096), 500, (1, 500)),  # then context again
    ],
)
def test_sequences_and_context_fit_the_memory(
    wanted: tuple[int, int], free_tokens: int, expected: tuple[int, int]
) -> None:
    free = int(free_tokens * 1000 / serving.CACHE_SHARE) + 1
    assert serving.sequences_that_fit(wanted, token_bytes=1000, free_bytes=free) == expected


def test_a_stated_context_is_kept_at_the_cost_of_sequences(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_bytes = 2 * 2 * 2 * 32 * 4  # keys and values, 2 layers, 2 heads of 32, float32
    free = int(3.5 * 512 * token_bytes / serving.CACHE_SHARE)
    monkeypatch.setattr("runtime.serving.engine.create.free_bytes", lambda _, **__: free)
    monkeypatch.setattr("runtime.serving.engine.create.LEAST_CONTEXT_TOKENS", 64)
    for stated, expected in [(512, (3, 512)), (None, (8, 224))]:
        made = create(config(rows=8, context_tokens=stated), load(tiny_llama_dir))
        assert isinstance(made, BatchingEngine)
        assert (made.max_sequences, made.context_tokens) == expected
        made.close()


def test_no_room_for_a_single_sequence_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match="MiB are free beside the weights"):
        serving.sequences_that_fit((1, 4096), token_bytes=1 << 20, free_bytes=10 << 20)


def test_a_share_of_the_devices_memory_leaves_the_rest_free() -> None:
    """10 of 80 are taken by others: at 0.9 there are 62 left of the 70 that are free."""
    assert within_share(70, 80, share=1) == 70
    assert within_share(70, 80, share=0.9) == 62
    assert within_share(5, 80, share=0.9) == 0
