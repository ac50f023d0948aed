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
    assert report["cache_bytes_per_token"] == 393_216
    assert report["cache_tokens"] >= report["context_tokens"] > 8 * 2048
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


LARGE = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: w}
resource: {RESOURCE}
inference: {preset: {name: llama-3.3-70b-instruct}}
"""


@pytest.mark.parametrize(
    ("resource", "words", "gpus"),
    [
        ("instanceType: Standard_NC48ads_A100_v4", [], 2),
        ("instanceType: Standard_ND96amsr_A100_v4", [], 2),
        ("instanceType: Standard_ND96amsr_A100_v4", ["--set", "parallel=tp"], 8),
        ("instanceType: Standard_ND96amsr_A100_v4", ["--set", "parallel=tp", "--set", "processes=4"], 4),
        ("partition: {mode: accelerator, count: 2}", ["--gpu", "H100-80GB"], 2),
        ("count: 1", ["--gpu", "2x A100-80GB"], 2),
    ],
)
def test_a_model_that_several_gpus_hold_is_planned_as_it_is_placed(
    resource: str, words: list[str], gpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "workspace.yaml"
    file.write_text(LARGE.replace("RESOURCE", resource))
    status, report = plan(str(file), *words, capsys=capsys)
    assert (status, report["gpus"], report["processes"]) == (0, gpus, gpus)
    weights = next(part["bytes"] for part in report["parts"] if part["name"] == "weights")
    assert weights == pytest.approx((68.45 / gpus + 2.1) * 2e9, rel=0.01)  # the embeddings are on each
    assert run(["plan", str(file), *words], {}) == 0
    assert f"One model is divided among {gpus} GPUs" in capsys.readouterr().out


def test_a_plan_of_several_gpus_says_what_its_figures_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "phi-4", "--serve", "--gpu", "4x A100-80GB"]
    assert run(words, {}) == 0
    assert "4 such servers have place on the 4 GPUs of a node." in capsys.readouterr().out
    assert run([*words, "--set", "replicas=2"], {}) == 0
    out = capsys.readouterr().out
    assert "There are 2 copies of the model, on GPUs of their own; figures are of one GPU." in out
    assert "2 such servers" in out
    assert run([*words, "--set", "limits.context_tokens=100000"], {}) == 0
    assert "limits.context_tokens is 100000, but phi-4 was made for 16384" in capsys.readouterr().out
    assert run([*words, "--set", "processes=8", "--set", "parallel=tp"], {}) == 2
    assert "processes is 8, each on a GPU of its own, and a node has 4" in capsys.readouterr().err
