"""torchrun for this project: starts the workers of one node, and prints no traceback of its own.

`python -m runtime.tuning.process.torchrun` takes torchrun's arguments. torchrun itself answers SIGTERM and
a failed worker with its own traceback, which hides the real reason; here the worker has logged the reason
and the parent (launcher.py) reports it. Start at `main`.
"""

import logging
import os
import signal
import sys

from runtime import garbage_collection, logs
from runtime.errors import one_line
from runtime.hardware import usable_cores
from runtime.tuning.process.failure import RENDEZVOUS_FAILED
from runtime.tuning.process.signals import end_with_parent

log = logging.getLogger("runtime.tuning.process.torchrun")

GRACE_OPTION = "--shutdown-timeout"


def main(arguments: list[str]) -> int:
    """Run the workers to their end; return 0, 1 when one failed, 128 + a signal, or RENDEZVOUS_FAILED."""
    logs.configure()
    end_with_parent()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of peers that have not started yet
    with garbage_collection.paused():
        from torch.distributed import DistError, run
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            # They log each signal and each worker that ends, not in JSON; the workers do so themselves.
            logging.getLogger(name).setLevel(logging.CRITICAL)
    usage = run.get_args_parser().format_help()
    options = run.parse_args(known_to(usage, arguments))  # type: ignore[no-untyped-call]
    # torchrun would give each of several workers one thread, and a single one as many as the node has.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // int(options.nproc_per_node))))
    try:
        run.run(options)  # type: ignore[no-untyped-call]
    except SignalException as error:
        return 128 + int(error.sigval)
    except (DistError, TimeoutError, RendezvousError) as error:
        log.error("rendezvous failed: %s", one_line(error))  # noqa: TRY400
        return RENDEZVOUS_FAILED
    except ChildFailedError as error:
        signals = {rank: -failure.exitcode for rank, failure in error.failures.items()}
    else:
        return 0
    for rank, number in sorted(signals.items()):
        if number > 0:  # it could not log this itself
            log.error("rank %d was killed by %s", rank, signal.Signals(number).name)
    return 1


def known_to(usage: str, arguments: list[str]) -> list[str]:
    """Return `arguments` without the grace period where torchrun's `usage` lacks it.

    torch before 2.12 always gives workers 30 s to end.
    """
    if GRACE_OPTION not in arguments or GRACE_OPTION in usage:
        return arguments
    place = arguments.index(GRACE_OPTION)
    return arguments[:place] + arguments[place + 2 :]


if __name__ == "__main__":
    garbage_collection.exit_without(main(sys.argv[1:]))
