"""The process of one replica: it loads the model and answers what the server sends it.

It ignores signals, which the server handles, and ends when that is gone (runtime/child.py). torch is imported
only after that is set up. Does not know HTTP. Start at `main`.
"""

import asyncio
import gc
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from runtime import child, garbage_collection, hardware, logs, models
from runtime.errors import CapacityError, Failure, exit_code, is_out_of_memory, one_line
from runtime.model_source import ModelSource
from runtime.serving.engine.protocol import Constraint, Grammar
from runtime.serving.engine.replicas.messages import ReplicaReady, ReplicaTask
from runtime.serving.engine.replicas.worker import ReplicaWorker
from runtime.serving.settings import ServeConfig
from runtime.serving.structured_output.compiler import GrammarCompiler

if TYPE_CHECKING:
    from runtime.serving.loading import LoadedModel

log = logging.getLogger("runtime.serving.replica")


def main() -> int:
    """Load what the first message says, answer until the server closes, and return the exit status."""
    channel: Connection[Any, Any] = Connection(child.begin().detach())
    try:
        task: ReplicaTask = channel.recv()
    except EOFError:  # the server has ended by now
        return 1
    logs.configure(rank=task.number)
    hardware.limit_kernel_caches()
    try:
        return asyncio.run(_serve(task, channel))
    except Exception as error:  # raised by the server, too, where it still loads
        failure = _failure_of(error, task)
        channel.send(failure)
        return exit_code(failure)


def _failure_of(error: Exception, task: ReplicaTask) -> Failure:
    if isinstance(error, Failure):
        return error
    said = f"replica {task.number} of {task.config.replicas}: {one_line(error)}"
    if is_out_of_memory(error):
        return CapacityError(f"{said}; lower limits.rows or limits.context_tokens, or start fewer replicas")
    log.error("A replica failed", exc_info=error)
    return Failure(said)


async def _serve(task: ReplicaTask, channel: "Connection[Any, Any]") -> int:
    loop = asyncio.get_running_loop()
    worker: ReplicaWorker | None = None

    def read() -> None:
        """Hand over what comes; that is nothing before ReplicaReady is sent, but the end of the server."""
        while True:
            try:
                message = channel.recv()
            except (EOFError, OSError):
                os._exit(1)
            if worker is not None:
                loop.call_soon_threadsafe(worker.take, message)

    threading.Thread(target=read, name="from server", daemon=True).start()
    # a thread that ends: each that has run torch's parallel operators on a CPU keeps a pool of threads
    with ThreadPoolExecutor(1, thread_name_prefix="load") as thread:
        loaded = await loop.run_in_executor(thread, _load, task.config)
    stop_ids = models.end_ids(loaded.generation_config.get("eos_token_id"))

    async def compile_grammar(constraint: Constraint) -> Grammar:
        compiler = await asyncio.to_thread(_compiler, task.config.model, stop_ids)
        return await compiler.compile(constraint)

    worker = ReplicaWorker(loaded.engine, send=channel.send, compile_grammar=compile_grammar)
    await worker.first_token()
    gc.collect()
    gc.freeze()  # the loaded model stays: collecting over its objects would delay every answer
    engine = loaded.engine
    ready = ReplicaReady(engine.context_tokens, loaded.weights, loaded.generation_config, engine.stats())
    channel.send(ready)
    return await worker.run()


def _load(config: ServeConfig) -> "LoadedModel":
    with garbage_collection.paused():
        from runtime.serving import loading

        return loading.load_own_engine(config, hardware.detect())


@cache
def _compiler(model: ModelSource, stop_ids: frozenset[int]) -> GrammarCompiler:
    """Return the compiler of the model's tokenizer, which is read for the first constraint."""
    tokenizer = models.load_tokenizer(model)
    return GrammarCompiler(tokenizer, stop_ids | models.end_ids(tokenizer.eos_token_id))


if __name__ == "__main__":
    garbage_collection.exit_without(main())
