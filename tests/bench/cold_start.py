"""From the start of a container to Ready, part by part, in the pod of KAITO's default runtime.

    python tests/bench/cold_start.py IMAGE MODEL_FOLDER [--seconds 60] [--rounds 3]

Runs podman: `inference_api.py` of the vLLM runtime with the weights mounted and without a network, then the
startup probe inside the container, as a kubelet does. A round is a fresh container; its page cache is warm
from the second round on. Parts come from the container's start time and the time stamps of the server's log.
"""

import argparse
import json
import subprocess
import time
from datetime import datetime
from pathlib import Path

MARKS = {
    "port open (interpreter, configuration)": "Listening on",
    "model loaded (torch, weights)": "Loaded ",
    "first token": "Model loaded successfully",
}
"""Part -> the beginning of the log line that ends it, in order."""


def podman(*words: str) -> str:
    return subprocess.run(["podman", *words], check=True, capture_output=True, text=True).stdout.strip()


def log_times(container: str) -> list[tuple[str, float]]:
    """Return (message, seconds since the epoch) of the server's log lines."""
    done = subprocess.run(["podman", "logs", container], check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]
    return [(line["msg"], datetime.fromisoformat(line["ts"]).timestamp()) for line in lines]


def measure(image: str, model: Path, seconds: int) -> dict[str, float]:
    """Return the seconds of each part of one start."""
    command = "python3 /workspace/vllm/inference_api.py --served-model-name=demo --max-model-len=auto"
    began = time.time()
    container = podman(
        "run", "-d", "--network=none", "-v", f"{model}:/workspace/weights:ro",
        "-e", f"BENCHMARK_DURATION_SEC={seconds}", "--entrypoint", "/bin/sh", image, "-c", command,
    )  # fmt: skip
    try:
        parts = {"container": time.time() - began}
        last = time.time()
        while not (times := dict(log_times(container))) or not any(
            message.startswith("Model loaded successfully") for message in times
        ):
            time.sleep(0.1)
        for part, beginning in MARKS.items():
            ended = next(at for message, at in times.items() if message.startswith(beginning))
            parts[part], last = ended - last, ended
        began = time.time()
        podman("exec", container, "python3", "/workspace/vllm/benchmark_entrypoint.py")
        parts["benchmark and its drain"] = time.time() - began
        return parts
    finally:
        podman("rm", "-f", "-t", "0", container)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image")
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=int, default=60, help="of the benchmark's load")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rounds = [measure(given.image, given.model.resolve(), given.seconds) for _ in range(given.rounds)]
    size = int(podman("image", "inspect", given.image, "--format", "{{.Size}}"))
    print(f"image {size / 1e6:.0f} MB")
    for part in rounds[0]:
        print(f"{part:42}", *(f"{each[part]:7.2f}" for each in rounds))
    without = [sum(each.values()) - given.seconds for each in rounds]
    print(f"{'all but the load of ' + str(given.seconds) + ' s':42}", *(f"{each:7.2f}" for each in without))


if __name__ == "__main__":
    main()
