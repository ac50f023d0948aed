"""Many rows are encoded in several processes, with the results of one, in order.

This process has the threads of torch by then and must not fork: one that has none is started and forks
(worker.py). Does not know files or jobs. Start at `results`.
"""

import logging
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from runtime import hardware
from runtime.errors import DataError, Failure
from runtime.logs import LogLine
from runtime.tuning.data import tokenize, worker
from runtime.tuning.data.example import Example
from runtime.tuning.data.tokenize import EncodedExample, Encoder

log = logging.getLogger(__name__)

FROM_ROWS = 5000
"""From here on processes pay: starting them takes as long as encoding some 2000 rows of 500 tokens."""
MOST_PROCESSES = 16
"""Beyond, what remains is reading, and passing rows on."""
_ROWS_AT_ONCE = 100

Result = EncodedExample | DataError


def results(examples: Sequence[Example], encoder: Encoder) -> Iterator[Result]:
    """Yield what `tokenize.results` does, from as many processes as pay and have a core."""
    processes = min(hardware.usable_cores(), MOST_PROCESSES)
    done = 0
    if processes > 1 and len(examples) >= FROM_ROWS and _can_be_sent(encoder):
        for result in _in_processes(examples, encoder, processes):
            yield result
            done += 1
        if done < len(examples):
            log.warning(
                "the processes that encode rows ended early, of too little memory perhaps; one goes on"
            )
    yield from tokenize.results(examples[done:], encoder)


def _can_be_sent(encoder: Encoder) -> bool:
    """Return whether another process can read an encoder: not one whose code is the model's own."""
    return not tokenize.is_models_own(type(encoder.tokenizer))


def _in_processes(examples: Sequence[Example], encoder: Encoder, processes: int) -> Iterator[Result]:
    """Yield results as long as processes give any: fewer than there are examples where these end early."""
    ours, theirs = multiprocessing.Pipe()
    command = [sys.executable, "-m", worker.__name__]
    host = subprocess.Popen(command, stdin=theirs.fileno())  # noqa: S603 - our own module
    theirs.close()
    feeder = threading.Thread(target=_feed, args=(ours, examples, encoder, processes), daemon=True)
    feeder.start()
    said: set[LogLine] = set()
    done = 0
    try:
        with suppress(EOFError, OSError):
            while done < len(examples):
                answer = ours.recv()
                if isinstance(answer, Failure):
                    raise answer
                part, lines = answer
                for line in lines:
                    if line not in said:  # each process says once what one would say once
                        said.add(line)
                        line.repeat()
                yield from part
                done += len(part)
    finally:
        host.kill()
        host.wait()
        feeder.join()
        ours.close()


def _feed(ours: Connection, examples: Sequence[Example], encoder: Encoder, processes: int) -> None:
    """Send what is to be done; it ends when all is sent, or the process is gone."""
    with suppress(OSError):
        ours.send((encoder, processes))
        for start in range(0, len(examples), _ROWS_AT_ONCE):
            ours.send(list(examples[start : start + _ROWS_AT_ONCE]))
        ours.send(None)
