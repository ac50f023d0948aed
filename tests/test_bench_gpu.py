"""The GPU script's own logic, on a CPU and a tiny shape, so that its first run on a GPU has no silly bug."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime import hardware

SCRIPT = Path(__file__).parent / "bench" / "gpu.py"


def test_without_a_gpu_it_says_so_and_ends_well() -> None:
    if hardware.detect().kind == "cuda":
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "no NVIDIA GPU here: nothing was measured\n")


@pytest.mark.long
def test_every_measurement_runs_on_a_tiny_shape() -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--shape", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    tuned = [line for line in figures if line[1] == "yes"]
    assert len(tuned) == 1
    assert all(float(cell) > 0 for cell in tuned[0][2:])
    decoded = [line for line in figures if len(line) == 7 and line[1] != "yes"]
    assert [line[0] for line in decoded] == ["1", "4"]
    assert all(float(cell) > 0 for line in decoded for cell in line[1:])
