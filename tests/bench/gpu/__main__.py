"""What one NVIDIA GPU does with this project, in eight steps: is it right, how fast is it, does it live.

    python -m tests.bench.gpu [--device auto|cuda|cpu] [--shape phi-3-mini|tiny] [--steps 1,2,8]
        [--seconds 360] [--out FOLDER]

Run it in the repository's root. Nothing is downloaded: models have random weights and are made on the spot.
Nothing needs to be installed with pip either: packages that the machine lacks are found by PYTHONPATH. On a
machine without a network:

    pip install --no-index --no-deps --no-compile --target /tmp/site WHEELS/*.whl
    PYTHONPATH=/tmp/site python3 -m tests.bench.gpu --out /tmp/bench

The steps are 1 what is here, 2 correctness, 3 attention of packs, 4 tuner, 5 engine, 6 decode attention, 7
quantised engine and memory that runs out, 8 tune and serve as commands. Each is a process with a time limit;
`--steps` chooses and orders them, and without it those that tell most come first. What the time does not
allow is left out by name, so a second run can be of that alone. FOLDER has all figures (results.jsonl, one
JSON object a case, units in the names) and all that each step printed (step-N.log).

`--device cpu --shape tiny` runs all of it in two minutes and proves nothing but that it runs.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from runtime import hardware
from runtime.errors import Failure
from tests.bench.gpu import report
from tests.bench.gpu.run import ORDER, STEPS, Bench, Step, read

MOST_SECONDS = 360
SCRATCH_BYTES = 24 << 30
"""Room for the random model and what the steps write: in memory where it has so much."""


def main() -> int:
    """Run the steps and print the report; return 0, 1 when something failed or was left out."""
    given = _arguments()
    device = _device(given.device)
    if device is None:
        print("no NVIDIA GPU here: nothing was measured")
        return 0
    out = given.out or Path(tempfile.mkdtemp(prefix="gpu-bench-"))
    out.mkdir(parents=True, exist_ok=True)
    shared_memory = Path("/dev/shm")
    roomy = shared_memory.is_dir() and shutil.disk_usage(shared_memory).free >= SCRATCH_BYTES
    with tempfile.TemporaryDirectory(prefix="gpu-bench-", dir=shared_memory if roomy else None) as scratch:
        bench = Bench(out, Path(scratch), device, given.shape, given.seconds)
        bench.results.unlink(missing_ok=True)
        whole = bench.run(given.steps)
    logs = {step.number: bench.log(step).read_text(errors="replace") for step in given.steps}
    print(report.text(read(bench.results), logs))
    print(f"everything is in {out}")
    return 0 if whole else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--shape", choices=("phi-3-mini", "tiny"), default="phi-3-mini")
    parser.add_argument(
        "--steps", type=_steps, default=_steps(",".join(map(str, ORDER))), help="numbers, in this order"
    )
    parser.add_argument("--seconds", type=_seconds, default=MOST_SECONDS, help=f"at most {MOST_SECONDS}")
    parser.add_argument("--out", type=Path, help="folder for figures and output; a temporary one by default")
    return parser.parse_args()


def _steps(words: str) -> list[Step]:
    known = {str(step.number): step for step in STEPS}
    chosen = [word.strip() for word in words.split(",")]
    if wrong := [word for word in chosen if word not in known]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no step, expected numbers from 1 to {len(STEPS)}")
    return [known[word] for word in dict.fromkeys(chosen)]


def _seconds(word: str) -> float:
    seconds = float(word)
    if not 0 < seconds <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{word} is not above 0 and at most {MOST_SECONDS}")
    return seconds


def _device(asked: str) -> str | None:
    """Return cuda or cpu; None where a GPU is left to be found and there is none."""
    if asked != "auto":
        return asked
    try:
        return "cuda" if hardware.detect().kind == "cuda" else None
    except Failure:  # there is one that the driver does not tell all of, which step 1 shows
        return "cuda"


if __name__ == "__main__":
    sys.exit(main())
