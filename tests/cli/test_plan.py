"""`runtime plan` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.cli.main import run

EXAMPLES = Path(__file__).parents[2] / "examples"
TUNING = str(EXAMPLES / "fine-tuning/kaito_workspace_tuning_phi_3.yaml")
SERVING = str(EXAMPLES / "inference/kaito_workspace_phi_3_with_adapter.yaml")


def plan(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = run(["plan", *words, "--json"], {})
    return status, json.loads(capsys.readouterr().out)


def test_the_manifests_own_gpu_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    status, report = plan(TUNING, capsys=capsys)
    assert (status, report["device"], report["dtype"], report["fits"]) == (0, "V100-16GB", "float16", True)
    assert report["total_bytes"] == sum(part["bytes"] for part in report["parts"])
    assert report["total_bytes"] <= report["available_bytes"]
    assert plan(TUNING, "--gpu", "a100-80gb", capsys=capsys)[1]["dtype"] == "bfloat16"


def test_what_does_not_fit_is_status_6_with_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--gpu", "T4-16GB", "--set", "training.per_device_train_batch_size=64"]
    assert run(["plan", TUNING, *given], {}) == 6
    line = capsys.readouterr().err
    assert "--fit adapts" in line
    assert line.count("\n") == 1
    assert run(["plan", TUNING, *given, "--set", "fit=adapt"], {}) == 0
    whole = ["--set", "method=lora", "--set", "training.gradient_checkpointing=true"]
    assert run(["plan", "llama-3.1-8b-instruct", "--gpu", "T4-16GB", *whole], {}) == 6
    assert "method qlora with load_in_4bit would fit" in capsys.readouterr().err


def test_a_server_plan_has_the_sequences_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    status, report = plan(SERVING, "--gpu", "V100-16GB", capsys=capsys)
    assert status == 0
    assert (report["rows"], report["cache_bytes_per_token"]) == (8, 393_216)
    assert run(["plan", "llama-3.3-70b-instruct", "--serve", "--gpu", "V100-16GB"], {}) == 6


def test_the_table_adds_up_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", TUNING], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("workspace-tuning-phi-3: qlora of phi-3-mini-128k-instruct on V100-16GB")
    figures = {line[:30].strip(): line.split() for line in lines}
    assert "base weights" in " ".join(figures)
    assert lines[-1].startswith("Fits: ")


def test_each_figure_says_how_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    _, report = plan(TUNING, capsys=capsys)
    bases = {part["name"]: part["basis"] for part in report["parts"]}
    assert bases["base weights"] == bases["optimizer state"] == "counted"
    assert bases["activations"] == bases["CUDA context"] == bases["fragmentation"] == "estimated"
    guessed = sum(part["bytes"] for part in report["parts"] if part["basis"] == "estimated")
    assert report["estimated_bytes"] == guessed
    assert run(["plan", TUNING], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{guessed / 2**30:.2f} GiB of it estimated" in next(it for it in lines if it.startswith("total"))
    assert " estimated " in next(it for it in lines if it.startswith("CUDA context"))


@pytest.mark.parametrize("gpu", ["V100-16GB", "T4-16GB"])
def test_a_model_that_overflows_float16_is_refused_where_there_is_no_bfloat16(
    gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["gemma-3-4b-instruct", "--serve"], ["gpt-oss-20b", "--serve"]):
        assert run(["plan", *words, "--gpu", gpu], {}) == 2
        line = capsys.readouterr().err
        assert "use a GPU of compute capability 8.0 or newer, or float32" in line
        assert line.count("\n") == 1


def test_a_server_of_one_request_at_a_time_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    status, report = plan("gemma-3-4b-instruct", "--serve", "--gpu", "A10", capsys=capsys)
    assert (status, report["rows"]) == (0, 1)
    assert run(["plan", "gemma-3-4b-instruct", "--serve", "--gpu", "A10"], {}) == 0
    assert "Fits: one request at a time, of 131072 tokens" in capsys.readouterr().out
    assert run(["plan", "gpt-oss-20b", "--serve", "--gpu", "A100-40GB"], {}) == 6
    assert "one sequence; take a larger GPU" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--serve"], []], ids=["serve", "tune"])
def test_what_no_engine_here_runs_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "ministral-3-8b-instruct", *words, "--gpu", "A100-80GB"], {}) == 2
    assert "a causal language model" in capsys.readouterr().err or not words
    assert run(["plan", "llama-2-7b-chat", *words, "--gpu", "A100-80GB"], {}) == 2
    assert "was retired by KAITO; use llama-3.1-8b-instruct" in capsys.readouterr().err


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from runtime.cli.main import run; "
        f"status = run(['plan', {TUNING!r}, '--gpu', 'V100-16GB'], {{}}); "
        "print(status, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_mistyped_gpu_is_a_configuration_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", TUNING, "--gpu", "V100"], {}) == 2
    assert "may be any of V100-16GB, V100-32GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("Standard_NC24ads_A100_v4", "A100-80GB"),
        ("g5.xlarge", "A10G-24GB"),
        ("RTX 3090", "RTX-3090-24GB"),
        ("24GB", "GPU of 24 GB"),
    ],
)
def test_any_name_of_a_gpu_is_planned_for(gpu: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = plan(TUNING, "--gpu", gpu, capsys=capsys)
    assert (status, report["device"]) == (0, device)
    assert ("assumed" in report) == (gpu == "24GB")


def test_a_manifest_with_an_unknown_machine_asks_for_its_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "workspace.yaml"
    file.write_text(Path(TUNING).read_text().replace("Standard_NC6s_v3", "Standard_Unheard_v9"))
    assert run(["plan", str(file)], {}) == 2
    assert (
        "'Standard_Unheard_v9', which is not known here; name its GPU with --gpu" in capsys.readouterr().err
    )
    assert plan(str(file), "--gpu", "A10", capsys=capsys)[1]["device"] == "A10-24GB"
    assert plan(str(file), "--gpu", "24GB", capsys=capsys)[1]["assumed"].startswith("Assumed of GPU of 24 GB")
