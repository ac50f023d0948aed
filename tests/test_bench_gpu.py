"""The GPU bench on a CPU and a tiny shape, so that its minutes on a GPU are not lost to a silly bug."""

import subprocess
import sys
import textwrap
import time
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from runtime import hardware
from tests.bench.gpu import report, run
from tests.bench.gpu.run import STEPS, Bench, Step, read

ROOT = Path(__file__).parents[1]
FIGURES = {
    1: {"gb_per_s", "tflop_per_s", "nf4_error", "memory_bytes"},
    2: {"loss", "worst_error", "tokens"},
    3: {"ms_per_pass", "first_ms", "launches"},
    4: {"tokens_per_s", "ms_per_step", "launches", "peak_gib", "planned_gib", "roofline_share"},
    5: {
        "tokens_per_s",
        "step_p50_ms",
        "step_p99_ms",
        "ttft_p50_ms",
        "new_p50_ms",
        "s_per_adapter",
        "waited_share",
    },
    6: {"gb_per_s", "roofline_share"},
    7: {"tokens_per_s", "others_answered", "answered_afterwards"},
    8: {"tune_s", "adapter_bytes", "ready_s", "first_chat_s", "openai_s"},
}
"""What each step has to have measured, all of it above 0."""
CASES = {1: 7, 2: 8, 3: 8, 4: 3, 5: 14, 6: 3, 7: 5, 8: 2}
"""Cases with figures; what needs a GPU or TRL says so instead."""

RAISES = """
    def run(context):
        context.case("before", lambda: {"seconds": 1.5})
        context.case("broken", lambda: {"seconds": 1 / 0})
        context.case("after", lambda: {"seconds": 2.5})
"""
HANGS = """
    import subprocess, time
    def run(context):
        child = subprocess.Popen(["sleep", "1000"])
        context.emit("begun", child=child.pid)
        hang()
    def hang():
        time.sleep(1000)
"""
CRASHES = """
    import os
    def run(context):
        context.emit("begun", seconds=1.0)
        os.abort()
"""
WORKS = """
    import torch
    def run(context):
        context.case("works", lambda: {"seconds": 3.5, "cudnn": torch.backends.cuda.cudnn_sdp_enabled()})
"""


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so_and_ends_well() -> None:
    if hardware.detect().kind == "cuda":
        pytest.skip("there is a GPU here")
    done = bench()
    assert (done.returncode, done.stdout) == (0, "no NVIDIA GPU here: nothing was measured\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--steps", "1,9"), "'9' is no step, expected numbers from 1 to 8"),
        (("--seconds", "400"), "400 is not above 0 and at most 360"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], said: str) -> None:
    done = bench("--device", "cpu", *arguments)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run steps that work, raise, crash and hang, and return whether all was well."""
    folder = tmp_path_factory.mktemp("stand-ins")
    sources = {"works": WORKS, "raises": RAISES, "crashes": CRASHES, "hangs": HANGS, "last": WORKS}
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    steps = [Step(9 - number, name, name, 5) for number, name in enumerate(sources)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        made = Bench(folder, folder, "cuda", "tiny", 300)
        whole = made.run(steps)
    return made, steps, whole


@pytest.mark.slow
def test_steps_run_in_the_order_given_whatever_others_do(stand_ins: Any) -> None:
    made, steps, whole = stand_ins
    ended = {line["step"]: line["ended"] for line in read(made.results) if "ended" in line}
    assert list(ended) == [step.number for step in steps]
    assert ended == {
        9: "done", 8: "failed with status 1", 7: "failed with status -6", 6: "killed after 5 s", 5: "done"
    }  # fmt: skip
    assert not whole


@pytest.mark.slow
def test_a_step_that_raises_keeps_its_traceback_and_its_figures(stand_ins: Any) -> None:
    made, steps, _ = stand_ins
    lines = [line for line in read(made.results) if line["step"] == 8 and "case" in line]
    assert [line["case"] for line in lines] == ["before", "broken", "after"]
    assert [line.get("seconds") for line in lines] == [1.5, None, 2.5]
    assert lines[1]["error"] == "ZeroDivisionError: division by zero"
    said = report.text(read(made.results), {})
    assert 'context.case("broken", lambda: {"seconds": 1 / 0})' in said
    assert 'lambda: {"seconds": 1 / 0}' in made.log(steps[1]).read_text()


@pytest.mark.slow
def test_a_step_that_crashes_or_hangs_is_named_with_where_it_was(stand_ins: Any) -> None:
    made, steps, _ = stand_ins
    logs = {step.number: made.log(step).read_text() for step in steps}
    said = report.text(read(made.results), logs)
    assert "step 7 failed with status -6" in said
    assert "Fatal Python error: Aborted" in logs[7]
    assert "step 6 killed after 5 s" in said
    assert " in hang" in said
    assert [
        line["seconds"] for line in read(made.results) if line.get("case") == "begun" and line["step"] == 7
    ]


@pytest.mark.slow
def test_steps_run_without_cudnn_attention_as_the_commands_do(stand_ins: Any) -> None:
    made, _, _ = stand_ins
    assert [line["cudnn"] for line in read(made.results) if line.get("case") == "works"] == [False, False]


@pytest.mark.slow
def test_what_a_killed_step_started_is_killed_too(stand_ins: Any) -> None:
    made, _, _ = stand_ins
    (child,) = (line["child"] for line in read(made.results) if "child" in line)
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    made = Bench(tmp_path, tmp_path, "cuda", "tiny", 4)
    began = time.monotonic()
    assert not made.run(list(STEPS[:2]))
    assert time.monotonic() - began < 10
    assert [line["ended"].partition(",")[0] for line in read(made.results)] == ["left out", "left out"]
    assert "1  step left out" in report.text(read(made.results), {})


def test_the_report_fits_the_end_of_a_log() -> None:
    figures = {f"figure_{number}": 123456.789 for number in range(20)}
    lines: list[dict[str, Any]] = [
        {"step": 1, "case": f"case {number}", "error": "x" * 300, "traceback": ["y" * 200] * 15, **figures}
        for number in range(90)
    ]
    said = report.text(lines, {})
    assert len(said) < 12_000
    assert len([line for line in said.splitlines() if line.startswith("1  case")]) == report.MOST_LINES - 1
    assert "… 31 more rows in the results file" in said


def test_a_gradient_that_is_off_is_a_fault() -> None:
    import torch

    from tests.bench.gpu.training import LastStep, errors

    class NoTrainer:
        training_step = None

    true = {"a": torch.randn(8, 8), "b": torch.randn(8, 8)}
    for factor, fault in ((1.01, False), (1.03, True), (float("nan"), True)):
        step = LastStep(NoTrainer())
        step.loss, step.gradients = 5.0, {name: factor * value for name, value in true.items()}
        assert ("fault" in errors(step, 5.0, true)) == fault
        assert "fault" in errors(step, 5.5, true)
    assert "fault" in errors(LastStep(NoTrainer()), 5.0, true)


def test_cudnn_attention_is_on_within_only() -> None:
    import torch

    from tests.bench.gpu.step import cudnn_attention

    flags = torch.backends.cuda
    before = flags.cudnn_sdp_enabled()
    try:
        flags.enable_cudnn_sdp(False)
        with pytest.raises(ZeroDivisionError), cudnn_attention():
            assert flags.cudnn_sdp_enabled()
            raise ZeroDivisionError
        assert not flags.cudnn_sdp_enabled()
    finally:
        flags.enable_cudnn_sdp(before)


def test_one_read_is_one_wait_and_a_counter_on_the_host_is_none() -> None:
    from tests.bench.gpu.traces import read as seen

    names = [
        "aten::item", "aten::_local_scalar_dense",  # of a tensor on the host
        "cudaLaunchKernel",
        "aten::item", "aten::_local_scalar_dense", "cudaMemcpyAsync", "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaLaunchKernel",
        "cudaDeviceSynchronize", "cudaDeviceSynchronize",  # the bench's, and the profiler's
    ]  # fmt: skip
    events = [recorded(name, number, "CPU") for number, name in enumerate(names)]
    events.append(recorded("Memcpy DtoH (Device -> Pageable)", 6, "CUDA"))
    events.append(recorded("Memcpy HtoD (Pageable -> Device)", 7, "CUDA"))
    trace = seen(SimpleNamespace(events=lambda: events[::-1]), gpu=True)  # type: ignore[arg-type]
    assert trace.waits == {"cudaStreamSynchronize": 1, "cudaDeviceSynchronize": 1}
    assert (trace.reads, trace.launches, trace.asked) == (1, 2, {"aten::item": 2})


def recorded(name: str, start: int, device: str) -> SimpleNamespace:
    """Return what torch's profiler gives of one event of 1 µs."""
    span = SimpleNamespace(start=start, end=start + 1, elapsed_us=lambda: 1)
    return SimpleNamespace(name=name, device_type=f"DeviceType.{device}", time_range=span)


def test_a_trace_on_a_cpu_counts_what_was_asked_and_no_waits() -> None:
    import torch

    from tests.bench.gpu.step import Context
    from tests.bench.gpu.traces import trace

    here = Context(3, "cpu", "tiny", Path(), Path())
    seen = trace(here, lambda: torch.ones(3).sum().item())
    assert (seen.waits, seen.reads, seen.asked) == ({}, 0, {"aten::item": 1})
    assert seen.launches > 1


def test_an_engine_with_memory_for_fewer_rows_says_so(tmp_path: Path) -> None:
    from tests.bench.gpu.load import Load, serving
    from tests.bench.gpu.models import build
    from tests.bench.gpu.step import Context

    results = tmp_path / "results.jsonl"
    here = Context(5, "cpu", "tiny", tmp_path, results)
    with serving(here, build(here), rows=2, context_tokens=64) as running:
        for rows in (3, 2):
            here.case(f"{rows} rows", lambda rows=rows: running.equal(rows, Load((5, 5), (3, 3))))  # type: ignore[misc]
    few, enough = read(results)
    assert few["not_here"] == "memory for 2 of 3 rows"
    assert enough["steps"] > 0
    assert not here.failed


def test_rows_that_never_decode_together_are_named(tmp_path: Path) -> None:
    from tests.bench.gpu.load import Load, serving
    from tests.bench.gpu.models import build
    from tests.bench.gpu.step import Context

    here = Context(5, "cpu", "tiny", tmp_path, tmp_path / "results.jsonl")
    with (
        serving(here, build(here), rows=2, context_tokens=64) as running,
        pytest.raises(RuntimeError, match=r"in none of \d+ steps did all of 2 rows decode"),
    ):
        running.equal(2, Load((5, 5), (1, 1)))


def test_the_busy_share_counts_overlapping_kernels_once() -> None:
    from tests.bench.gpu.traces import busy

    assert busy([(0, 4), (2, 6), (8, 10)]) == pytest.approx(0.8)
    assert busy([(5, 6), (0, 10)]) == 1.0


@pytest.mark.long
def test_every_step_gives_its_figures_on_a_cpu(tmp_path: Path) -> None:
    done = bench("--device", "cpu", "--shape", "tiny", "--out", str(tmp_path))
    lines = read(tmp_path / "results.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["ended"] for line in lines if "ended" in line] == ["done"] * 8
    for number, names in FIGURES.items():
        mine = [line for line in lines if line["step"] == number and "case" in line]
        measured = [line for line in mine if "took_s" in line]
        assert len(measured) >= CASES[number], mine
        missing = [name for name in names if not any(line.get(name, 0) > 0 for line in measured)]
        assert not missing, (number, missing, mine)
    assert max(line["gradient_error"] for line in lines if "gradient_error" in line) < 1e-4
    assert all(line["gap_share"] < 1e-4 for line in lines if "gap_share" in line)


def test_a_process_that_cannot_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is in no group of its own stands in for one that a driver holds."""
    monkeypatch.setattr(run, "KILLED_S", 0.1)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            run._kill(process)
            assert process.poll() is None
            assert process.stdin is not None
            assert process.stdin.closed
        finally:
            process.kill()


def test_the_page_lists_every_package_that_a_machine_with_torch_alone_lacks() -> None:
    def walk(requirement: Requirement, found: set[str]) -> set[str]:
        name = canonicalize_name(requirement.name)
        if name not in found:
            found.add(name)
            for each in map(Requirement, distribution(name).requires or []):
                extras = requirement.extras or {""}
                if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                    walk(each, found)
        return found

    with (ROOT / "pyproject.toml").open("rb") as stream:
        wanted = [Requirement(text) for text in tomllib.load(stream)["project"]["dependencies"]]
    needed: set[str] = set().union(*(walk(each, set()) for each in wanted))
    page = (ROOT / "tests/bench/README.md").read_text()
    listed = set(
        page.partition("constraints.txt (filelock")[2].partition("\n\n")[2].partition("\n\n")[0].split()
    )
    assert listed == needed - walk(Requirement("torch"), set()) | {"filelock"}
