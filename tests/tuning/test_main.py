"""`python -m runtime.tuning FILE`, as torchrun starts it by hand."""

import subprocess
import sys
from pathlib import Path

SEED = Path(__file__).parents[2] / "examples/fine-tuning/kaito_workspace_tuning_phi_3.yaml"


def test_worker_refuses_a_manifest_with_placeholders() -> None:
    command = [sys.executable, "-m", "runtime.tuning", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "ACR_REPO_HERE" in done.stderr
