"""The worker processes of a server that divides its model: started, connected, watched, ended.

Rank 0 is the server itself; each worker is `python -m runtime.serving.engine.parallel.worker` and holds its
shard. Workers end when rank 0 broadcasts `Stop`, and when it is gone (child.py).
Does not know models or requests. Start at `Workers`.
"""

import contextlib
import logging
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from runtime import child, hardware
from runtime.errors import kind_of_exit
from runtime.hardware import Hardware
from runtime.model_source import ModelSource
from runtime.serving.engine import failures
from runtime.serving.engine.parallel.group import Group, rendezvous
from runtime.serving.engine.parallel.worker import WorkerTask, loaded_key

log = logging.getLogger(__name__)

MODULE = "runtime.serving.engine.parallel.worker"
"""What the processes run."""
POLL_S = 0.1
"""How often the processes are checked."""
STOP_S = 10.0
"""Time that the workers are given to end after the last command."""


class Workers:
    """The processes of ranks 1 and up."""

    def __init__(self, model: ModelSource, devices: Hardware, *, world: int, threads: int) -> None:
        """Start them; `model` has its `path`. ConfigError where there are fewer GPUs than ranks."""
        self._world = world
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        file = Path(self._folder.name) / "rendezvous"
        self._store = rendezvous(file, world)
        dtype = hardware.compute_dtype(devices, model.dtype)
        tasks = [
            WorkerTask(
                model=model, rank=rank, world=world, device=hardware.device(devices, rank), dtype=dtype,
                threads=threads, rendezvous=file,
            )
            for rank in range(1, world)
        ]  # fmt: skip
        started = {task.rank: _start(task) for task in tasks}
        self._processes = {rank: process for rank, (process, _) in started.items()}
        self._channels = [channel for _, channel in started.values()]

    def connect(self, device: str) -> Group:
        """Wait until every rank has loaded its shard, and return the group; raise what a rank ended with."""
        loaded = [loaded_key(rank) for rank in self._processes]
        while not self._store.check(loaded):
            if (lost := self._lost()) is not None:
                rank, status = lost
                kind = kind_of_exit(status)
                raise kind(f"{self._describe(rank, status)} while it loaded; its own line says why")
            time.sleep(POLL_S)
        return Group(self._store, rank=0, world=self._world, device=device)

    def watch(self, on_loss: Callable[[], None]) -> None:
        """Call `on_loss`, from a thread, when a process ends by itself."""

        def poll() -> None:
            running = True
            while running:
                running = any(process.poll() is None for process in self._processes.values())
                if (lost := self._lost()) is not None:
                    log.error(
                        "%s: without its part of the model nothing can be answered", self._describe(*lost)
                    )
                    on_loss()
                    return
                time.sleep(POLL_S)

        threading.Thread(target=poll, name="workers", daemon=True).start()

    def wait(self) -> None:
        """Wait for the processes to end after `Stop`; kill those that do not."""
        deadline = time.monotonic() + STOP_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for channel in self._channels:
            channel.close()
        failed = [rank for rank, process in self._processes.items() if process.returncode]
        if not failed:
            log.info("All %d ranks have ended", self._world)
        self._folder.cleanup()

    def kill(self) -> None:
        """Kill the processes: this server will not start."""
        for process in self._processes.values():
            process.kill()
        self.wait()

    def _lost(self) -> tuple[int, int] | None:
        """Return the rank and status of a process that ended by itself, or None."""
        ended = ((rank, process.poll()) for rank, process in self._processes.items())
        return next(((rank, status) for rank, status in ended if status), None)

    def _describe(self, rank: int, status: int) -> str:
        return f"rank {rank} of {self._world} {failures.how_ended(status)}"


def _start(task: WorkerTask) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    process, channel = child.start(MODULE)
    with contextlib.suppress(OSError):  # it has ended, which its status says
        channel.sendall(task.model_dump_json().encode() + b"\n")
    return process, channel
