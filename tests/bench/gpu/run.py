"""Runs the steps, one process after another, each within its time, all within one deadline.

Whatever a step does (raise, crash, hang), the figures that it had written stay, its whole output is a file,
and the next one runs. Knows no GPU: without torch. Start at `Bench.run`.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
RESULTS = "results.jsonl"
LEAST_S = 8.0
"""A step with less time than this is left out."""
IMPORT_S = 60.0
"""Most time that the imports of a step take."""
KILLED_S = 10.0
SLOW = 3
RESERVE_S = 3.0
"""Of the deadline, for the table."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the run."""

    number: int
    title: str
    module: str
    """Module with `run(context)`."""
    limit_s: float
    """Time after which its process group is killed."""


STEPS = tuple(
    Step(number, title, f"tests.bench.gpu.{module}", limit_s)
    for number, title, module, limit_s in (
        (1, "what is here", "versions", 30),
        (2, "correctness", "correctness", 60),
        (3, "attention of packs", "packs", 45),
        (4, "tuner", "tuner", 100),
        (5, "engine", "engine", 110),
        (6, "decode attention of one layer", "decode_attention", 40),
        (7, "quantised engine, and memory that runs out", "quantised", 50),
        (8, "tune and serve as commands", "commands", 60),
    )
)
ORDER = (1, 2, 8, 3, 5, 4, 6, 7)
"""What tells most comes first, should the time be short."""


@dataclass(slots=True)
class Bench:
    """One run."""

    out: Path
    """Where the figures and the steps' output go."""
    scratch: Path
    device: str
    shape: str
    seconds: float
    """All steps together."""
    until: float = field(init=False)

    def __post_init__(self) -> None:
        self.until = time.monotonic() + self.seconds - RESERVE_S

    @property
    def results(self) -> Path:
        return self.out / RESULTS

    def run(self, steps: list[Step]) -> bool:
        """Run `steps` in this order; return whether all of them ended well."""
        self.results.touch()
        whole = True
        process = self._start(steps[0]) if steps else None
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            assert process is not None
            ready = self._ready(process)
            limit_s = min(self._limit_s(step), self.until - time.monotonic())
            begun = time.monotonic()
            enough = limit_s >= min(LEAST_S, step.limit_s)
            if enough:
                self._let(process, limit_s)
            ahead = self._start(following) if following else None
            ended = self._wait(process, limit_s) if enough else "left out"
            _kill(process)  # and what it may have left running
            if ended != "done" and not ready:
                ended = f"{ended}, not even imported"
            self._note(step, ended, time.monotonic() - begun)
            whole &= ended == "done"
            process = ahead
        return whole

    def _limit_s(self, step: Step) -> float:
        """Return the time of a step; a CPU that others use too is slow, and proves nothing by it."""
        return step.limit_s * (SLOW if self.device == "cpu" else 1)

    def log(self, step: Step) -> Path:
        """Return the file with all that `step` printed."""
        return self.out / f"step-{step.number}.log"

    def _start(self, step: Step) -> "subprocess.Popen[str]":
        """Start the process of `step`, which imports and then waits."""
        fields = {
            "module": step.module, "number": step.number, "device": self.device, "shape": self.shape,
            "scratch": str(self.scratch), "results": str(self.results),
        }  # fmt: skip
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        if self.shape == "tiny":  # threads wait for each other longer than they work
            environ["OMP_NUM_THREADS"] = "1"
        with self.log(step).open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.bench.gpu.child", json.dumps(fields)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env=environ,
            )

    def _ready(self, process: "subprocess.Popen[str]") -> bool:
        """Wait until the process has imported what its step needs; return whether it has."""
        assert process.stdout is not None
        for_s = min(IMPORT_S, max(self.until - time.monotonic(), 0))
        able, _, _ = select.select([process.stdout], [], [], for_s)
        return bool(able) and process.stdout.readline() == "ready\n"

    def _let(self, process: "subprocess.Popen[str]", seconds: float) -> None:
        """Tell the process of a step that it is its turn."""
        assert process.stdin is not None
        with contextlib.suppress(OSError), process.stdin:  # it may have ended, which `_wait` finds
            process.stdin.write(f"{seconds}\n")

    def _wait(self, process: "subprocess.Popen[str]", seconds: float) -> str:
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"killed after {seconds:.0f} s"
        return "done" if status == 0 else f"failed with status {status}"

    def _note(self, step: Step, ended: str, seconds: float) -> None:
        line = {"step": step.number, "title": step.title, "ended": ended, "took_s": round(seconds, 1)}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{line['took_s']:6.1f} s  step {step.number} ({step.title}): {ended}", flush=True)


def read(results: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file; one that its process was killed in the middle of is left out."""
    lines = []
    for line in results.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _kill(process: "subprocess.Popen[str]") -> None:
    """Kill the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver can hold a killed process
        process.wait(timeout=KILLED_S)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
