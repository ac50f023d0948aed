"""Push of one 500 MB file to a loopback registry: ours, skopeo and plain oras-py in one run.

    python tests/bench/push.py [--megabytes 500] [--rounds 3]

Needs docker-registry and skopeo. Each client pushes to an empty repository of the same registry; the
rounds take turns, so that other work on the machine meets all of them. Peak memory is that of the
client's process alone (getrusage), the building of the layer is in the wall time of ours and of oras-py.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = """
import sys; from pathlib import Path; from runtime import oci
oci.push(Path(sys.argv[1]), oci.parse(sys.argv[2]))
"""
ORAS = """
import os, sys, oras.client
os.chdir(sys.argv[1])
oras.client.OrasClient(insecure=True).push(
    sys.argv[2], files=["adapter_model.safetensors:application/octet-stream"], do_chunked=%s, quiet=True)
"""
IDLE = "import runtime.oci.repository"


def measure(command: list[str]) -> tuple[float, float]:
    """Run `command`; return wall seconds and its peak memory in MiB."""
    started = time.monotonic()
    child = os.spawnvp(os.P_NOWAIT, command[0], command)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"failed: {command}")
    return time.monotonic() - started, usage.ru_maxrss / 1024


def start_registry(folder: Path) -> tuple["subprocess.Popen[bytes]", str]:
    """Start a registry on a free port; return the process and its host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "http": {"addr": host},
    }
    config["storage"] = {
        "filesystem": {"rootdirectory": str(folder / "registry")},
        "delete": {"enabled": True},
    }
    (folder / "config.yml").write_text(json.dumps(config))
    process = subprocess.Popen(["docker-registry", "serve", folder / "config.yml"], stderr=subprocess.DEVNULL)
    while True:
        try:
            socket.create_connection(tuple(host.split(":")), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return process, host


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    missing = [name for name in ("docker-registry", "skopeo") if shutil.which(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        folder = Path(made)
        data = folder / "data"
        data.mkdir()
        with (data / "adapter_model.safetensors").open("wb") as file:
            for _ in range(options.megabytes):
                file.write(os.urandom(1_000_000))
        layout = f"oci:{folder}/layout:v1"
        subprocess.run([sys.executable, "-c", OURS, data, layout], check=True)
        registry, host = start_registry(folder)
        python = [sys.executable, "-c"]
        clients = {
            "ours (folder to registry)": lambda ref: [*python, OURS, str(data), ref],
            "skopeo copy --preserve-digests (built layout)": lambda ref: [
                "skopeo", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false", layout, f"docker://{ref}"
            ],
            "oras-py, whole": lambda ref: [*python, ORAS % "False", str(data), ref],
            "oras-py, chunked": lambda ref: [*python, ORAS % "True", str(data), ref],
        }  # fmt: skip
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
        try:
            for turn in range(options.rounds):
                for number, (name, command) in enumerate(clients.items()):
                    results[name].append(measure(command(f"{host}/bench-{turn}-{number}:v1")))
                    # Blobs are shared by content between repositories on disk: start each from nothing.
                    shutil.rmtree(folder / "registry", ignore_errors=True)
        finally:
            registry.terminate()
            registry.wait()
        _, baseline = measure([*python, IDLE])
        print(f"{options.megabytes} MB, {options.rounds} rounds, median (least) seconds and peak MiB")
        for name, runs in results.items():
            seconds = [run[0] for run in runs]
            peak = max(run[1] for run in runs)
            print(f"{name:48s} {statistics.median(seconds):6.2f} ({min(seconds):5.2f}) s {peak:7.0f} MiB")
        print(f"python with our modules loaded, idle {baseline:.0f} MiB")
        ours, skopeo, *_ = (statistics.median(run[0] for run in runs) for runs in results.values())
        print(f"ours / skopeo: {ours / skopeo:.2f}")


if __name__ == "__main__":
    main()
