"""torchrun for this project: starts the workers of one node, and ends without a word of its own.

`python -m runtime.tuning.process.torchrun` takes torchrun's arguments. Left to itself torchrun answers
SIGTERM and a failed worker with a traceback of its own making, below which the real reason is hard to find;
here the worker has logged the reason and the parent (launcher.py) tells it. Start at `main`.
"""

import logging
import os
import signal
import sys

from runtime import garbage_collection, logs
from runtime.hardware import usable_cores
from runtime.tuning.process.failure import NOT_MET
from runtime.tuning.process.signals import end_with_parent

log = logging.getLogger("runtime.tuning.process.torchrun")


def main(arguments: list[str]) -> int:
    """Run the workers to their end; return 0, 1 when one failed, 128 + a signal, or NOT_MET."""
    logs.configure()
    end_with_parent()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of peers that are not there yet
    with garbage_collection.paused():
        from torch.distributed import DistError, run
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            # Announces each signal and each worker it ends, not in JSON; the workers speak for themselves.
            logging.getLogger(name).setLevel(logging.CRITICAL)
    options = run.parse_args(arguments)  # type: ignore[no-untyped-call]
    # torchrun would give each of several workers one thread, and a single one as many as the node has.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // int(options.nproc_per_node))))
    try:
        run.run(options)  # type: ignore[no-untyped-call]
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except (DistError, TimeoutError, RendezvousError) as error:
        log.error("the nodes of this job did not meet: %s", " ".join(str(error).split())[:300])  # noqa: TRY400
        return NOT_MET
    except ChildFailedError as failed:
        signals = {rank: -reason.exitcode for rank, reason in failed.failures.items()}
    else:
        return 0
    for rank, number in sorted(signals.items()):
        if number > 0:  # it could not speak for itself
            log.error("rank %d was ended by %s", rank, signal.Signals(number).name)
    return 1


if __name__ == "__main__":
    garbage_collection.exit_without(main(sys.argv[1:]))
