"""A process that serves a model together with others, not the first: it loads its share and does as told.

Its standard input holds one line, a Task, and closes when rank 0 is gone. Signals are rank 0's to answer.
torch is imported only after both are seen to. Does not know requests. Start at `run`.
"""

import logging
import os
import signal
import sys
import threading
from pathlib import Path

from runtime import garbage_collection, logs
from runtime.config import Strict
from runtime.errors import Failure, exit_code
from runtime.model_source import ModelSource

log = logging.getLogger("runtime.serving.engine.parallel.worker")


class WorkerTask(Strict):
    """What one process is told to hold and where the others are."""

    model: ModelSource
    """With its `path`: rank 0 has fetched it."""
    rank: int
    world: int
    device: str
    dtype: str
    threads: int
    """For torch's operators on a CPU, which all ranks share."""
    meeting: Path
    """File through which they find each other; all of them are on this machine."""


def arrived(rank: int) -> str:
    """Return the key by which `rank` says that its share is loaded."""
    return f"loaded {rank}"


def main() -> int:
    """Follow rank 0 to its end and return the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    task = WorkerTask.model_validate_json(sys.stdin.readline())
    logs.configure(rank=task.rank)
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    try:
        run(task)
    except Failure as failure:
        log.error("rank %d: %s", task.rank, failure)  # noqa: TRY400 - foreseen, and its text says it all
        return exit_code(failure)
    except RuntimeError as error:  # torch's: out of memory, or the others are gone
        log.error("rank %d: %s", task.rank, " ".join(str(error).split())[:300])  # noqa: TRY400
        return 1
    return 0


def run(task: WorkerTask) -> None:
    """Load the share of `task`, meet the others, and run what rank 0 runs."""
    import torch

    from runtime import models
    from runtime.serving import engine
    from runtime.serving.engine.model_runner import ModelRunner, Rank
    from runtime.serving.engine.parallel import shard
    from runtime.serving.engine.parallel.group import Begin, Group, meeting

    torch.set_num_threads(task.threads)
    store = meeting(task.meeting, task.world)
    config = models.load_config(task.model)
    share = shard.Shard.of(config, task.rank, task.world)
    dtype = getattr(torch, task.dtype)
    model = shard.load(models.locate(task.model), config, share, dtype=dtype, device=task.device)
    store.set(arrived(task.rank), "")
    team = Group(store, rank=task.rank, world=task.world, device=task.device)
    team.least(engine.free_bytes(model, processes=task.world))
    first = team.hear()
    if isinstance(first, Begin):  # else rank 0 has failed in between
        membership = Rank(team, share)
        ModelRunner(model, rows=first.rows, positions=first.positions, membership=membership).follow()
    team.leave()


def _end_with_rank_0() -> None:
    """Standard input ends with rank 0, however that ends."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    garbage_collection.exit_without(main())
