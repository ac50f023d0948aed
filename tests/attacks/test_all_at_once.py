"""Everybody who harms a server, at once, beside one client who does not."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.attacks.test_grammar_author import slowest_livez_s
from tests.serving.conftest import Process

ATTACK_S, MANNERS_S, WARM_UP_S = 45, 20, 8
PROMPTS = ["one", "two words", "a third prompt"]


class Bystander:
    """A client that asks the same questions one after another, greedily, until it is stopped.

    Answered 429, it asks again after Retry-After, and the time of that answer counts the wait.
    """

    def __init__(self, url: str) -> None:
        self.took: list[float] = []
        self.answers: dict[str, set[str]] = {prompt: set() for prompt in PROMPTS}
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Bystander":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def typical_s(self) -> float:
        """The median time of an answer."""
        return sorted(self.took)[len(self.took) // 2]

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.wait(0.1):
                for prompt in PROMPTS:
                    body = {"prompt": prompt, "temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
                    started = time.monotonic()
                    reply = client.post("/chat", json=body)
                    while reply.status_code == 429 and not self._stop.wait(
                        float(reply.headers["retry-after"])
                    ):
                        reply = client.post("/chat", json=body)
                    self.took.append(time.monotonic() - started)
                    answer = reply.json()["Result"] if reply.is_success else f"status {reply.status_code}"
                    self.answers[prompt].add(answer)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.model
def test_a_bystander_is_answered_while_all_attack(tiny_llama_dir: Path) -> None:
    server = Process.serve(tiny_llama_dir, "--set", "limits.rows=32", "--set", "limits.queue=64")
    try:
        server.wait_ready(180)
        report = attacked(server)
    finally:
        server.close()
    print(report)  # shown where an assertion fails
    assert not [kind for kind in report["counts"] if kind.split()[1].startswith("5")], report
    assert report["counts"]["ordinary 200"] > ATTACK_S * 5  # of 11 a second whose clients stay
    assert report["livez_s"] < 1  # 0.03
    _, middle, end = report["memory_kb"]
    assert end - middle < 60_000, report
    assert report["answers"] == report["alone"], "greedy answers changed"
    assert report["slower"] < 2, report  # 1.2 where nothing else runs
    assert report["status"] == 0


def attacked(server: Process) -> dict[str, Any]:
    """Return what was seen while the crowd attacked `server`, beside what was seen while it had manners."""
    attack(server, WARM_UP_S)  # kernels for all sizes
    with Bystander(server.url) as before:
        mannered = attack(server, MANNERS_S, "manners")
    memory = [resident_kb(server)]
    done = threading.Event()
    livez: list[float] = []
    prober = threading.Thread(target=lambda: livez.append(slowest_livez_s(server.url, done)))
    prober.start()
    with Bystander(server.url) as during:
        middle = threading.Timer(ATTACK_S / 2, lambda: memory.append(resident_kb(server)))
        middle.start()
        counts = attack(server, ATTACK_S)
    done.set()
    prober.join()
    return {
        "mannered": mannered,
        "counts": counts,
        "livez_s": max(livez),
        "memory_kb": [*memory, resident_kb(server)],
        "alone": before.answers,
        "answers": during.answers,
        "typical_s": [before.typical_s, during.typical_s],
        "slower": during.typical_s / before.typical_s,
        "status": server.stop(timeout_s=60),
    }


def attack(server: Process, seconds: int, who: str = "attacks") -> dict[str, int]:
    """Let the crowd at `server` and return how many answers had which status."""
    command = [sys.executable, str(Path(__file__).with_name("crowd.py")), server.url, str(seconds), who]
    ran = subprocess.run(command, capture_output=True, check=True, text=True, timeout=seconds + 120)
    return dict(json.loads(ran.stdout))


def resident_kb(server: Process) -> int:
    """Return the memory of the server's own process."""
    return int(psutil.Process(server.process.pid).memory_info().rss) // 1024
