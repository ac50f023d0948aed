"""The process of one step: imports what the step needs, waits for its turn, and runs it.

The first argument is JSON: the step's module, and the fields of `Context`. Imports take some ten seconds, so
the process is started while the step before it measures; it says on standard output that it is ready, and
touches the device when a line on standard input says how many seconds it has. All else that it prints goes to
standard error. Start at `main`.
"""

import faulthandler
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

SPARE_S = 2.0
"""Before the time limit: a stack of every thread goes into the log of a step that hangs."""


def main(given: str) -> int:
    """Run a step; return 0, 1 when a case failed."""
    parent = os.dup(1)
    os.dup2(2, 1)
    from runtime.attention import disable_cudnn
    from tests.bench.gpu.step import Context

    fields = json.loads(given)
    step = import_module(fields.pop("module"))
    os.write(parent, b"ready\n")
    os.close(parent)
    turn = sys.stdin.readline()
    if not turn:  # the run has ended without this step
        return 0
    seconds = json.loads(turn)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(seconds - SPARE_S, seconds / 2))
    paths = {name: Path(fields.pop(name)) for name in ("scratch", "results")}
    context = Context(**fields, **paths, until=time.monotonic() + max(seconds - 2 * SPARE_S, seconds / 2))
    disable_cudnn()  # as the commands do
    step.run(context)
    faulthandler.cancel_dump_traceback_later()
    return int(context.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
