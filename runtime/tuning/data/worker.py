"""The process that encodes rows in several processes: it starts without torch's threads, and forks.

Started as a module by encoding_processes.py, with a connection as standard input: over it come an encoder and
lists of examples, and go the results in order. Does not know files or jobs. Start at `serve`.
"""

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import Connection

from runtime.errors import DataError, Failure
from runtime.logs import LogLine, Overhearing
from runtime.tuning.data import tokenize
from runtime.tuning.data.example import Example
from runtime.tuning.data.tokenize import EncodedExample, Encoder
from runtime.tuning.process.signals import end_with_parent

Part = tuple[list[EncodedExample | DataError], list[LogLine]]
"""What some rows become, and what was said of them."""

_WAITING = 2
"""Lists of rows that wait for each process, so that none is idle: what is read ahead takes memory."""

_encoders: list[Encoder] = []
"""The one that forked processes have from this one."""


def serve(connection: Connection) -> None:
    """Answer each list of examples with a `Part`, in order, until None comes; or with what ends the job.

    Ends early where a process of its own was killed.
    """
    encoder, processes = connection.recv()
    _encoders.append(encoder)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, end_with_parent, (os.getpid(),)) as pool:
        given = iter(connection.recv, None)
        running: deque[Future[Part]] = deque()
        _submit(pool, running, islice(given, _WAITING * processes))
        while running:
            try:
                answer: Part | Failure = running.popleft().result()
            except BrokenProcessPool:  # one was killed; who waits for answers says so
                return
            except Failure as failure:  # without a template no row can be encoded
                answer = failure
            connection.send(answer)
            _submit(pool, running, islice(given, 1))


def _submit(pool: ProcessPoolExecutor, running: deque[Future[Part]], parts: Iterator[list[Example]]) -> None:
    running.extend(pool.submit(_encode, part) for part in parts)


def _encode(examples: list[Example]) -> Part:
    with Overhearing("runtime.tuning.data") as heard:
        return list(tokenize.results(examples, _encoders[0])), heard.lines


if __name__ == "__main__":
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    logging.getLogger("runtime").setLevel(logging.INFO)
    serve(Connection(0))
