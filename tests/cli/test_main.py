"""The command line: quick without torch, one line and the right status per failure."""

import json
import os
import resource
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import __version__, errors
from runtime.cli import main
from tests.cli.conftest import failure_line
from tests.costs import plain_pass_s

ROOT = Path(__file__).parents[2]
SEED = str(ROOT / "examples/fine-tuning/kaito_workspace_tuning_phi_3.yaml")
SERVE = str(ROOT / "examples/inference/kaito_workspace_phi_3_with_adapter.yaml")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["presets"], ["tune", "--dry-run", SEED], ["serve", "--dry-run", SERVE], ["tune", "--help"]],
    ids=["help", "presets", "tune", "serve", "tune-help"],
)
def test_answers_at_once_and_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from runtime.cli import main; import os\n"
        f"status = main.run({arguments!r}, os.environ)\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'pyarrow', 'oras'}\n"
        "heavy &= set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), status)"
    )
    cost = unit = float("inf")
    for _ in range(4):  # about 4.5 times a plain pass; torch takes 12 to 17
        unit = min(unit, plain_pass_s())
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stdout.splitlines()[-1] == "HEAVY [] 0", done.stdout
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        cost = min(cost, spent)
        if cost < 6 * unit:
            return
    raise AssertionError(f"{cost:.2f} s is over 6 times a plain pass of {unit:.2f} s")


@pytest.mark.parametrize("word", ["version", "--version"])
def test_version_is_a_command_and_an_option(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([word], {}) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_console_script_runs() -> None:
    script = Path(sys.executable).with_name("runtime")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.count(".") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "missing.yaml"], "missing.yaml: no such file"),
        (["tune", "phi-3"], "did you mean 'phi-3-mini-4k-instruct'"),
        (["tune"], "no model: give a preset"),
        (["serve"], "no model: give a preset"),
        (["serve", "phi-44"], "no model 'phi-44'"),
        (["presets", "phi44"], "unknown preset 'phi44' (did you mean 'phi-4'"),
        (["tune", SEED], "still holds the placeholder"),
        (["serve", SERVE], "still holds the placeholder"),
        (["tune", SEED, "--set", "lora.r"], "expected KEY=VALUE"),
        (["tune", SEED, "--set", "lora.r=many"], "'lora.r' is 'many'"),
        (["tune", SEED, "--set", "lora.rr=1"], "unknown key 'lora.rr'"),
        (["tune", SEED, "--config", "missing.yaml"], "missing.yaml: no such file"),
        (["tune", SEED, "--data", "missing.parquet"], "--data: missing.parquet: no such file or directory"),
        (["serve", "phi-4", "--adapter", "x"], "expected NAME=DIRECTORY or NAME=IMAGE"),
        (["serve", "phi-4", "--adapter", "a b=./x"], "name"),
        (["serve", "phi-4", "--set", "limits.rows=0"], "'limits.rows' is 0"),
        (["serve", "phi-4", "--set", "limit.rows=1"], "did you mean 'limits'"),
        (["serve", "phi-4", "--api-key-env", "NOPE"], "NOPE: this variable is not set"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_wrong_configuration_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], away: Path
) -> None:
    assert main.run(arguments, {}) == 2
    assert message in failure_line(capsys)


@pytest.mark.parametrize("arguments", [["tune", "--bogus"], ["bogus"], ["serve", "phi-4", "--port", "x"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments, {}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--help`" in line


def _run_ending_with(error: BaseException, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    def fail(job: object, **_: object) -> None:
        raise error

    launcher = types.ModuleType("runtime.tuning.launcher")
    launcher.run = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "runtime.tuning.launcher", launcher)
    import runtime.tuning

    monkeypatch.setattr(runtime.tuning, "launcher", launcher, raising=False)
    return main.run(["tune", SEED, "--output", "out", *flags], {})


@pytest.mark.parametrize(
    ("kind", "status"), list(errors.EXIT_CODES.items()), ids=lambda value: getattr(value, "__name__", "")
)
def test_every_failure_has_its_status(
    kind: type[errors.Failure],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    away: Path,
) -> None:
    assert _run_ending_with(kind("what went wrong"), monkeypatch) == status
    last = json.loads(capsys.readouterr().err.splitlines()[-1])  # fault 58: JSON to the last line
    assert last["msg"] == "what went wrong"
    assert last["level"] == ("warning" if kind is errors.StoppedError else "error")


def test_our_own_bug_is_one_line_and_a_traceback_only_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], away: Path
) -> None:
    assert _run_ending_with(ZeroDivisionError("oops"), monkeypatch) == 1
    assert (
        failure_line(capsys)
        == "error: internal error: ZeroDivisionError: oops; rerun with --debug for the traceback"
    )
    assert _run_ending_with(ZeroDivisionError("oops"), monkeypatch, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_file_closed_to_this_user_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], away: Path
) -> None:
    assert _run_ending_with(PermissionError(13, "Permission denied", "/job/workspace.yaml"), monkeypatch) == 2
    whom = f"user {os.geteuid()} with group {os.getegid()}"
    assert failure_line(capsys).startswith(f"error: /job/workspace.yaml: permission denied for {whom}; open")


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, away: Path) -> None:
    assert _run_ending_with(KeyboardInterrupt(), monkeypatch) == 130


def test_failure_line_holds_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], away: Path
) -> None:
    error = errors.DataError("https://x.example/rows.parquet?sig=SECRET answered 403")
    assert _run_ending_with(error, monkeypatch) == 3
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["level"], last["msg"]) == ("error", "https://x.example/rows.parquet answered 403")


def test_wheel_installs_with_its_presets_and_pages(tmp_path: Path) -> None:
    """Builds the wheel, unpacks it elsewhere as an installation does, and looks from there."""
    pytest.importorskip("hatchling", reason="pip install hatchling builds the wheel without the network")
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels], cwd=ROOT, check=True
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    page = "runtime/serving/http/page"
    files = {path.relative_to(ROOT / page) for path in (ROOT / page).rglob("*.*")}
    assert files <= {path.relative_to(site / page) for path in (site / page).rglob("*.*")}
    assert (site / page / "marked/LICENSE").is_file()
    code = "from runtime import presets; print(presets.__file__, len(presets.all_presets()))"
    environ = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ, cwd=tmp_path
    )
    file, count = done.stdout.split()
    assert file.startswith(str(site))
    assert int(count) == len(list(_listed()))


def _listed() -> Iterator[str]:
    from runtime.presets import all_presets

    return (preset.name for preset in all_presets())
