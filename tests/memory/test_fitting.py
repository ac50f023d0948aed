"""What is chosen on which device, and what stays as the user wrote it."""

from dataclasses import replace

import pytest

from runtime import gpus, hardware
from runtime.memory import fitting, shape
from runtime.memory.fitting import Adjustable
from runtime.memory.tuning import TuningRun
from runtime.presets import source

LLAMA = shape.of(source("llama-3.1-8b-instruct"))
RUN = TuningRun(2048, 2048, "float16", "cuda")


def chosen(gpu: str, adjustable: Adjustable, run: TuningRun = RUN) -> fitting.Forecast:
    return fitting.choose(LLAMA, run, adjustable, room=fitting.available(gpus.of_kind(gpu)))


def test_a_large_gpu_recomputes_nothing() -> None:
    plan = chosen("A100-80GB", Adjustable(2048))
    assert plan.fits
    assert not plan.run.checkpointing
    assert plan.run.tokens == 2048


def test_checkpointing_is_chosen_where_it_is_needed_unless_the_job_sets_it() -> None:
    assert chosen("V100-16GB", Adjustable(2048)).run.checkpointing
    requested = chosen("V100-16GB", Adjustable(2048, checkpointing=False))
    assert not requested.fits
    assert not requested.run.checkpointing


def test_passes_shrink_before_layers_are_computed_again() -> None:
    plan = chosen("V100-16GB", Adjustable(512), replace(RUN, tokens=2048))
    assert plan.fits
    assert (plan.run.checkpointing, plan.run.tokens < 2048) in ((False, True), (True, False))
    fixed = chosen("T4-16GB", Adjustable(512, smaller_passes=False), replace(RUN, tokens=40_000))
    assert fixed.run.tokens == 40_000
    assert not fixed.fits


@pytest.mark.parametrize(("gpu", "least"), [("A100-80GB", 8192), ("A10-24GB", 2048), ("V100-16GB", 2048)])
def test_passes_grow_into_free_memory_up_to_what_gains(gpu: str, least: int) -> None:
    wanted = Adjustable(2048, larger_passes=fitting.SATURATING_TOKENS["cuda"])
    plan, fixed = chosen(gpu, wanted), chosen(gpu, Adjustable(2048))
    assert plan.fits
    assert least <= plan.run.tokens <= fitting.SATURATING_TOKENS["cuda"]
    assert plan.run.checkpointing == fixed.run.checkpointing, "a larger pass is not worth computing again"
    grown = plan.run.tokens > fixed.run.tokens
    assert not grown or plan.total_bytes <= fitting.ENLARGED * plan.available_bytes


def test_rows_are_cut_only_where_that_is_allowed() -> None:
    long = replace(RUN, tokens=32_768)
    assert not chosen("T4-16GB", Adjustable(32_768), long).fits
    cut = chosen("T4-16GB", Adjustable(32_768, shorter_rows=True), long)
    assert cut.fits
    assert cut.row_tokens == cut.run.tokens < 32_768


def test_the_largest_pass_fits_and_one_larger_does_not() -> None:
    room = fitting.available(gpus.of_kind("A10-24GB"))
    largest = fitting.largest_tokens(LLAMA, RUN, room=room)
    assert fitting.forecast(LLAMA, replace(RUN, tokens=largest), room=room, row_tokens=1).fits
    assert not fitting.forecast(LLAMA, replace(RUN, tokens=largest + 8), room=room, row_tokens=1).fits


def test_processes_on_a_cpu_share_its_memory() -> None:
    cpu = hardware.Hardware("cpu", "test", None, 8 << 30, 1)
    assert fitting.available(cpu, processes=2) == fitting.available(cpu) // 2
