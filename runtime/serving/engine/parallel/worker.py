"""A worker process of a server that divides its model: it loads its shard and runs rank 0's commands.

It is sent one line, a WorkerTask. It ignores signals, which rank 0 handles, and ends when that is gone
(child.py). torch is imported only after that is set up. Does not know requests. Start at `run`.
"""

import contextlib
import logging
import os
import socket
import threading
from pathlib import Path

from runtime import child, garbage_collection, logs
from runtime.config import Strict
from runtime.errors import Failure, exit_code, is_out_of_memory, one_line
from runtime.model_source import ModelSource
from runtime.serving.engine import failures

log = logging.getLogger("runtime.serving.engine.parallel.worker")


class WorkerTask(Strict):
    """What one worker process has to load, and where it finds the others."""

    model: ModelSource
    """With its `path`: rank 0 has downloaded it."""
    rank: int
    world: int
    device: str
    dtype: str
    threads: int
    """For torch's operators on a CPU, which all ranks share."""
    rendezvous: Path
    """File through which the ranks find each other; all of them are on this machine."""


def loaded_key(rank: int) -> str:
    """Return the key that `rank` sets in the rendezvous store once its shard is loaded."""
    return f"loaded {rank}"


def main() -> int:
    """Run rank 0's commands to the end and return the exit status."""
    channel = child.begin()
    with channel.makefile("rb") as lines:
        task = WorkerTask.model_validate_json(lines.readline())
    logs.configure(rank=task.rank)
    threading.Thread(target=_end_with_rank_0, args=(channel,), daemon=True).start()
    try:
        run(task)
    except Failure as failure:
        log.error("rank %d: %s", task.rank, failure)  # noqa: TRY400 - expected, and its text is complete
        return exit_code(failure)
    except (RuntimeError, MemoryError, OSError) as error:  # out of memory, or another rank is gone
        if is_out_of_memory(error):
            reason = failures.rank_out_of_memory(task.rank, error)
            log.error("%s", reason)  # noqa: TRY400 - expected, and its text is complete
            return exit_code(reason)
        log.error("rank %d: %s", task.rank, one_line(error))  # noqa: TRY400
        return 1
    return 0


def run(task: WorkerTask) -> None:
    """Load the shard of `task`, connect to the other ranks, and run what rank 0 broadcasts."""
    import torch

    from runtime import attention, models
    from runtime.memory.pool import PoolSize
    from runtime.serving.engine.create import free_bytes
    from runtime.serving.engine.model_runner import ModelRunner, Rank
    from runtime.serving.engine.parallel import shard
    from runtime.serving.engine.parallel.group import Group, rendezvous

    attention.disable_cudnn()
    torch.set_num_threads(task.threads)
    store = rendezvous(task.rendezvous, task.world)
    config = models.load_config(task.model)
    own_shard = shard.Shard.of(config, task.rank, task.world)
    dtype = getattr(torch, task.dtype)
    model = shard.load(models.locate(task.model), config, own_shard, dtype=dtype, device=task.device)
    store.set(loaded_key(task.rank), "")
    group = Group(store, rank=task.rank, world=task.world, device=task.device)
    group.all_reduce_min(free_bytes(model, processes=task.world))
    first = group.receive()
    if isinstance(first, PoolSize):  # else rank 0 has failed in between
        ModelRunner(model, first, rank=Rank(group, own_shard)).run_commands()
    group.close()


def _end_with_rank_0(channel: socket.socket) -> None:
    """End this process with rank 0, whose end, of whatever kind, closes the channel."""
    with contextlib.suppress(OSError):
        channel.recv(1)
    os._exit(1)


if __name__ == "__main__":
    garbage_collection.exit_without(main())
