"""Servers: sequences and context that fit beside the weights."""

from dataclasses import replace

import pytest

from runtime import gpus
from runtime.memory import serving, shape
from runtime.memory.serving import ServingRun
from runtime.presets import source

PHI = shape.of(source("phi-3-mini-128k-instruct"))


def test_phi_3_mini_takes_384_kib_a_token() -> None:
    capacity = serving.forecast(PHI, ServingRun(4, 4096, "float16"), gpus.of_kind("V100-16GB"))
    assert capacity.token_bytes == 393_216
    assert capacity.fits
    held = sum(part.size_bytes for part in capacity.parts)
    assert held == pytest.approx(capacity.available_bytes, abs=capacity.token_bytes)


def test_a_model_too_large_leaves_no_sequence() -> None:
    large = shape.of(source("llama-3.3-70b-instruct"))
    assert not serving.forecast(large, ServingRun(1, 2048, "bfloat16"), gpus.of_kind("A100-80GB")).fits
    four = ServingRun(1, 2048, "bfloat16", bits=4, double_quant=True)
    assert serving.forecast(large, four, gpus.of_kind("A100-80GB")).fits
    assert serving.fits_on(large, ServingRun(1, 2048, "bfloat16"))[0] == "H200-141GB"


def test_a_pool_of_tokens_serves_one_long_prompt_or_many_short_ones() -> None:
    """Slots of equal length gave 32 x 8,771 tokens here, and refused a prompt of 10,000 on an empty GPU."""
    capacity = serving.forecast(PHI, ServingRun(256, 131_072, "bfloat16"), gpus.of_kind("H200-141GB"))
    assert (capacity.sequences, capacity.context_tokens) == (256, 131_072)
    assert capacity.cache_tokens > 250_000


@pytest.mark.parametrize(("name", "gigabytes"), [("gpt-oss-20b", 42), ("gpt-oss-120b", 234)])
def test_mxfp4_is_planned_at_what_it_is_dequantised_to(name: str, gigabytes: int) -> None:
    model = shape.of(source(name))
    part = serving.weights(model, ServingRun(1, 2048, "bfloat16"))
    assert part.size_bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert part.size_bytes > 2.5 * model.stored_bytes
    assert "dequantised from the mxfp4" in part.how
    assert not serving.forecast(model, ServingRun(1, 2048, "bfloat16"), gpus.of_kind("A100-40GB")).fits


def test_gpus_without_bfloat16_are_not_proposed_to_models_that_overflow_float16() -> None:
    gemma = shape.of(source("gemma-3-4b-instruct"))
    assert serving.fits_on(gemma, ServingRun(1, 2048, "bfloat16"))[0] == "A10-24GB"
    assert "V100-32GB" in serving.fits_on(gemma, ServingRun(1, 2048, "float32"))
    assert serving.fits_on(PHI, ServingRun(1, 2048, "bfloat16"))[0] == "T4-16GB"


def test_each_figure_says_whether_it_is_known_or_estimated() -> None:
    capacity = serving.forecast(PHI, ServingRun(4, 4096, "float16"), gpus.of_kind("V100-16GB"))
    assert {part.name: part.basis for part in capacity.parts} == {
        "weights": "counted",
        "CUDA context": "estimated",
        "keys and values": "counted",
        "room for a step's work": "estimated",
    }


def test_an_engine_that_answers_one_request_at_a_time_is_planned_for_one() -> None:
    gemma = shape.of(source("gemma-3-4b-instruct"))
    run = ServingRun(32, 131_072, "bfloat16")
    capacity = serving.forecast(gemma, run, gpus.of_kind("A100-80GB"))
    assert (capacity.sequences, capacity.context_tokens) == (1, 131_072)
    assert capacity.token_bytes == 139_264
    cache = next(part for part in capacity.parts if part.name == "keys and values")
    each = 2 * 4 * 256 * 2  # keys and values of a layer, 4 heads of 256, in 16 bits
    assert cache.size_bytes == each * (5 * 131_072 + 29 * 1024)
    many = serving.forecast(gemma, replace(run, engine="vllm"), gpus.of_kind("A100-80GB"))
    assert many.sequences == 32
