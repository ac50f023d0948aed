"""Which engine a model gets, and how many sequences of which length fit beside it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM

from runtime import families
from runtime.memory import pool
from runtime.model_source import ModelSource, Quantization
from runtime.serving.engine.backends.simple import SimpleEngine
from runtime.serving.engine.create import create, draft_tokens, within_share
from runtime.serving.engine.engine import BatchingEngine
from runtime.serving.engine.patch import refusal
from runtime.serving.settings import Limits, ServeConfig
from tests.families import model_of
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


def test_the_pool_has_what_fits_and_one_request_may_have_all_of_it(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token_bytes = 2 * 2 * 2 * 32 * 4  # keys and values, 2 layers, 2 heads of 32, float32
    free = int(700.5 * token_bytes) + pool.sampling_bytes(8, 512)
    monkeypatch.setattr("runtime.serving.engine.create.free_bytes", lambda _, **__: free)
    caplog.set_level(logging.INFO)
    made = create(config(rows=8, context_tokens=512), load(tiny_llama_dir))
    assert (made.max_sequences, made.context_tokens, made.stats().cache_tokens) == (8, 512, 700)
    made.close()
    assert "Key-value pool: 700 tokens (0.0 GiB), for up to 8 sequences of up to 512 tokens" in caplog.text
    made = create(config(rows=8, context_tokens=1024), load(tiny_llama_dir))
    assert (made.context_tokens, made.stats().cache_tokens) == (700, 700)
    made.close()
    assert "Memory allows requests of 700 tokens, prompt and answer together, not 1024" in caplog.text


def test_windows_have_a_pool_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = create(config(rows=2), model_of("gemma2", max_position_embeddings=2048))
    made.close()
    assert "4096 tokens in layers that see all" in caplog.text
    assert f"{2 * (16 + 512)} tokens in layers that see 16 " in caplog.text


def test_more_sequences_run_at_once_on_a_gpu_unless_a_number_is_stated() -> None:
    assert [Limits().rows_on(device) for device in ("cuda", "cpu")] == [256, 32]
    assert Limits(rows=64).rows_on("cpu") == 64


def test_a_share_of_the_devices_memory_leaves_the_rest_free() -> None:
    """10 of 80 are taken by others: at 0.9 there are 62 left of the 70 that are free."""
    assert within_share(70, 80, share=1) == 70
    assert within_share(70, 80, share=0.9) == 62
    assert within_share(5, 80, share=0.9) == 0


@pytest.mark.parametrize(
    ("bits", "device", "tokens"),
    [(None, "cuda", 16), (4, "cuda", 3), (8, "cuda", 0), (None, "cpu", 16), (4, "cpu", 16), (8, "cpu", 0)],
)
def test_drafts_are_as_many_as_quantised_weights_take_at_little_cost(
    bits: int | None, device: str, tokens: int
) -> None:
    quantization = Quantization(bits=bits) if bits else None
    settings = config().model_copy(update={"quantization": quantization})
    assert draft_tokens(settings, device) == tokens
    assert draft_tokens(settings.model_copy(update={"speculative_tokens": 0}), device) == 0
