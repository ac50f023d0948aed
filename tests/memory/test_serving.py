"""Servers: sequences and context that fit beside the weights."""

from dataclasses import replace

import pytest

from runtime import gpus
from runtime.errors import CapacityError
from runtime.memory import serving, shape
from runtime.memory.counting import CacheSize
from runtime.memory.serving import ServingRun, sequences_that_fit
from runtime.presets import source

PHI = shape.of(source("phi-3-mini-128k-instruct"))


def test_phi_3_mini_takes_384_kib_a_token() -> None:
    capacity = serving.forecast(PHI, ServingRun(4, 4096, "float16"), gpus.of_kind("V100-16GB"))
    assert capacity.token_bytes == 393_216
    assert (capacity.sequences, capacity.context_tokens) == (4, 3616) or capacity.fits
    held = sum(part.size_bytes for part in capacity.parts)
    assert held == pytest.approx(capacity.available_bytes, abs=capacity.token_bytes * capacity.sequences)


def test_a_model_too_large_leaves_no_sequence() -> None:
    large = shape.of(source("llama-3.3-70b-instruct"))
    assert not serving.forecast(large, ServingRun(1, 2048, "bfloat16"), gpus.of_kind("A100-80GB")).fits
    four = ServingRun(1, 2048, "bfloat16", bits=4, double_quant=True)
    assert serving.forecast(large, four, gpus.of_kind("A100-80GB")).fits
    assert serving.fits_on(large, ServingRun(1, 2048, "bfloat16"))[0] == "H200-141GB"


def test_context_gives_way_before_sequences_and_sequences_before_short_contexts() -> None:
    gib = 1 << 30
    assert sequences_that_fit((4, 4096), token_bytes=1 << 10, free_bytes=gib) == (4, 4096)
    assert sequences_that_fit((32, 131072), token_bytes=1 << 14, free_bytes=2 * gib) == (32, 3276)
    assert sequences_that_fit((32, 131072), token_bytes=1 << 14, free_bytes=gib // 2) == (12, 2048)
    assert sequences_that_fit((8, 4096), token_bytes=1 << 20, free_bytes=gib) == (1, 819)
    with pytest.raises(CapacityError, match="one sequence of 16 tokens"):
        sequences_that_fit((8, 4096), token_bytes=1 << 20, free_bytes=1 << 22)


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


def test_states_and_windows_leave_room_for_longer_sequences() -> None:
    size = CacheSize(token=10, window_token=90, window=100, sequence=1000)
    room = {999: 0, 1000: 0, 2000: 10, 11_000: 100, 11_009: 100, 12_000: 200, 10**9: 4096}
    assert {values: serving._longest(size, values, 4096) for values in room} == room
    assert serving._longest(CacheSize(sequence=5), 5, 4096) == 4096
    assert serving._longest(CacheSize(window_token=1, window=10), 10, 4096) == 4096
