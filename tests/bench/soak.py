"""Mixed traffic with clients that go away, for as long as you like, and what it left behind in the server.

    runtime serve MODEL --port 8000 &
    python -m tests.bench.soak http://127.0.0.1:8000 $! --seconds 600

Prints one JSON object: answers by status, memory's slope over the second half, open files before and after.
"""

import argparse
import json
import random
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

SAMPLE_S = 0.5


@dataclass
class Report:
    """What a soak found."""

    seconds: float
    statuses: Counter[str] = field(default_factory=Counter)
    """Answers by status; "left" are streams that the client gave up, "failed" what got no answer."""
    memory_kb: list[int] = field(default_factory=list)
    """Resident memory of the server, every SAMPLE_S seconds."""
    files: list[int] = field(default_factory=list)
    """Open file descriptors: before, and after all clients are gone."""

    @property
    def slope_kb_per_min(self) -> float:
        """Least-squares slope of memory over the second half, when caches are full."""
        half = self.memory_kb[len(self.memory_kb) // 2 :]
        times = [index * SAMPLE_S / 60 for index in range(len(half))]
        middle, mean = sum(times) / len(times), sum(half) / len(half)
        above = sum((t - middle) * (kb - mean) for t, kb in zip(times, half, strict=True))
        return above / (sum((t - middle) ** 2 for t in times) or 1.0)


def soak(url: str, pid: int, *, seconds: float, clients: int = 8, key: str = "none") -> Report:
    """Send mixed traffic for `seconds` from `clients` threads and watch the process `pid`."""
    report = Report(seconds)
    end = time.monotonic() + seconds
    report.files.append(_files(pid))
    threads = [
        threading.Thread(target=_client, args=(url, key, number, end, report.statuses))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        report.memory_kb.append(_memory_kb(pid))
        time.sleep(SAMPLE_S)
    for thread in threads:
        thread.join()
    time.sleep(1.0)  # the server notices closed connections in its own time
    report.files.append(_files(pid))
    return report


def _client(url: str, key: str, seed: int, end: float, statuses: Counter[str]) -> None:
    dice = random.Random(seed)
    headers = {"Authorization": f"Bearer {key}"}
    while time.monotonic() < end:
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            for _ in range(dice.randint(1, 10)):
                try:
                    statuses[_request(client, dice)] += 1
                except httpx.TransportError:
                    statuses["failed"] += 1


def _request(client: httpx.Client, dice: random.Random) -> str:
    """Send one request of a random kind and return how it ended."""
    words = " ".join(dice.choices(["hello", "fox", "question", "lazy", "dog"], k=dice.randint(1, 120)))
    kind = dice.randrange(6)
    if kind == 0:
        return str(client.get("/metrics").status_code)
    if kind == 1:
        return str(client.post("/v1/chat/completions", json={"messages": "wrong"}).status_code)
    body = {"prompt": words, "max_new_tokens": dice.randint(1, 24), "temperature": 1.0}
    if kind < 4:
        return str(client.post("/chat", json=body).status_code)
    with client.stream("POST", "/chat", json={**body, "stream": True}) as stream:
        for number, _ in enumerate(stream.iter_lines()):
            if kind == 5 and number >= 2:
                return "left"
        return str(stream.status_code)


def _memory_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def _files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def main() -> None:
    """Read the command line, soak, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("pid", type=int)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--key", default="none")
    given = parser.parse_args()
    report = soak(given.url, given.pid, seconds=given.seconds, clients=given.clients, key=given.key)
    kept = asdict(report) | {
        "statuses": dict(report.statuses),
        "memory_kb": report.memory_kb[:: max(1, len(report.memory_kb) // 20)],
    }
    print(json.dumps(kept | {"slope_kb_per_min": round(report.slope_kb_per_min)}, indent=2))


if __name__ == "__main__":
    main()
