"""Step 8: `runtime tune` under torchrun on 40 rows, then `runtime serve` with the adapter.

The model is small: this shows that the commands work here, and where their seconds go. Start at `run`.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.bench.gpu.step import Context, Figures
from tests.conftest import write_tiny_llama

ROWS = 40
READY_S, ANSWER_S = 60.0, 30.0
LOG_LINES = 15


def run(context: Context) -> None:
    """Tune, then serve what was tuned."""
    folder = context.scratch / "commands"
    folder.mkdir(exist_ok=True)
    write_tiny_llama(folder / "model", head_dim=32)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(_row(number) for number in range(ROWS)), encoding="utf-8")
    if context.case("tune", lambda: _tuned(context, folder)):
        context.case("serve", lambda: _served(context, folder))


def _row(number: int) -> str:
    question = {
        "role": "user",
        "content": f"What is the number of item {number}? " + "Think. " * (number % 7),
    }
    answer = {"role": "assistant", "content": f"The number of item {number} is {17 * number % 101}."}
    return json.dumps({"messages": [question, answer]}) + "\n"


def _environ(context: Context) -> dict[str, str]:
    """Return the environment of the commands: without a GPU where the run is to have none."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if context.device == "cpu" else {}
    return {**os.environ, **hidden}


def _tuned(context: Context, folder: Path) -> Figures:
    """Return the seconds of the command, and of its phases as its log has them."""
    words = [
        "tune",
        str(folder / "model"),
        "--data",
        str(folder / "rows.jsonl"),
        "--output",
        str(folder / "out"),
    ]
    words += ["--set", "training.max_steps=6", "--set", "training.per_device_train_batch_size=8"]
    words += ["--set", "metrics_port=0"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "runtime", *words],
        capture_output=True,
        text=True,
        env=_environ(context),
        timeout=max(context.left_s(), 1),
        check=False,
    )
    print(done.stdout, done.stderr, sep="\n", flush=True)
    whole_s = time.monotonic() - began
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-LOG_LINES:])
        raise RuntimeError(f"runtime tune ended with {done.returncode}: {last}")
    losses = [float(word) for word in re.findall(r"loss (\d+\.\d+)", done.stdout + done.stderr)]
    adapter = folder / "out" / "adapter_model.safetensors"
    return {
        "tune_s": whole_s,
        "losses": losses,
        "adapter_bytes": adapter.stat().st_size,
        "log": _phases(done.stdout + done.stderr),
    }


def _phases(log: str) -> list[str]:
    """Return each line of a JSON log as its time and its message."""
    lines = []
    for line in log.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            said = str(record.get("message", record.get("msg", "")))[:100]
            lines.append(f"{record.get('time', record.get('ts', ''))} {said}")
    return lines


def _served(context: Context, folder: Path) -> Figures:
    """Return the seconds until the server is ready, of a first and a second answer, and of its end."""
    port = _free_port()
    words = ["serve", str(folder / "model"), "--adapter", f"tuned={folder / 'out'}", "--served-name", "base"]
    began = time.monotonic()
    server = subprocess.Popen(
        [sys.executable, "-m", "runtime", *words, "--host", "127.0.0.1", "--port", str(port)],
        env=_environ(context),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(server, url, until=min(began + READY_S, context.until))
        ready_s = time.monotonic() - began
        chat = {"prompt": "What is the number of item 3?", "max_new_tokens": 16, "temperature": 0}
        plain, first_s = _post(f"{url}/chat", chat)
        tuned, second_s = _post(f"{url}/chat", {**chat, "adapter": "tuned"})
        question = [{"role": "user", "content": chat["prompt"]}]
        body = {"model": "tuned", "messages": question, "max_tokens": 16, "temperature": 0}
        completion, openai_s = _post(f"{url}/v1/chat/completions", body)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=ANSWER_S)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    figures: Figures = {
        "ready_s": ready_s,
        "first_chat_s": first_s,
        "second_chat_s": second_s,
        "openai_s": openai_s,
        "end_s": time.monotonic() - began,
        "status": status,
        "adapter_differs": plain["Result"] != tuned["Result"],
        "answer": completion["choices"][0]["message"]["content"][:60],
    }
    if status not in (0, 143):
        figures["fault"] = f"the server ended with status {status} after SIGTERM"
    return figures


def _post(url: str, body: dict[str, Any]) -> tuple[Any, float]:
    """Return the JSON answer, and the seconds that it took."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    began = time.monotonic()
    with urllib.request.urlopen(request, timeout=ANSWER_S) as reply:
        return json.loads(reply.read()), time.monotonic() - began


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(server: "subprocess.Popen[bytes]", url: str, *, until: float) -> None:
    """Return once /readyz says yes; RuntimeError when the server ends, or the time does."""
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"runtime serve ended with status {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError("runtime serve was not ready in time")
