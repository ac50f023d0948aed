"""Compiles constraints for one tokenizer: once a form, in processes that can be killed, a few at a time.

A form that was compiled stays with its process for the requests that follow; a refusal is remembered too.
Does not know llguidance, which runs in `host`. Start at `GrammarCompiler.compile`.
"""

import asyncio
import hashlib
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from runtime.errors import OverloadedError, RequestError, UnavailableError
from runtime.serving.engine.protocol import Constraint, Grammar
from runtime.serving.structured_output import limits
from runtime.serving.structured_output.lanes import Lanes
from runtime.serving.structured_output.process import FormHost, FormProcess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPILED_AT_ONCE = 8
"""The kernel shares the processors among them: a small form overtakes large ones."""
WAITING = 64
"""Forms that wait for one of those; a further one is refused."""
KEPT_FORMS = 16
"""Compiled forms that stay after their last answer, each a process of a few MiB."""
LIVE_FORMS = 64
"""Different forms that answers follow at the same time."""
KEPT_REFUSALS = 1024
KILLED_FOR_S = 60.0
"""How long a form is refused that was killed: the machine may have been at fault."""


@dataclass(slots=True)
class CompiledForm:
    """What is known of a form: its process, or why it is refused."""

    process: FormProcess | None = None
    relaxed: tuple[str, ...] = ()
    value: Any = None
    refusal: str = ""
    until_s: float = float("inf")
    """time.monotonic() when the refusal is forgotten."""


class GrammarCompiler:
    """Compiles constraints for one tokenizer; `start` it early, and `close` it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._host = FormHost(self._vocabulary, sorted(stop_ids))
        self._lanes = Lanes(COMPILED_AT_ONCE, WAITING)
        self._forms: OrderedDict[str, CompiledForm] = OrderedDict()
        self._refusals: OrderedDict[str, CompiledForm] = OrderedDict()
        self._compiling: dict[str, Future[None]] = {}
        self._live: weakref.WeakSet[FormProcess] = weakref.WeakSet()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the host in the background, where the library is installed: it takes about a second."""
        if _installed():
            threading.Thread(target=self._start, name="grammar host", daemon=True).start()

    def _start(self) -> None:
        try:
            self._host.start()
        except (OSError, UnavailableError, ValueError):  # raised again for the request that needs it
            return

    def close(self) -> None:
        """End all processes."""
        self._host.close()
        for process in list(self._live):
            process.kill()

    async def compile(self, constraint: Constraint, client: str = "") -> Grammar:
        """Return the grammar of `constraint`; `client` is who waits for it.

        Raises RequestError where it is not well-formed, beyond the limits, or the library is not installed;
        OverloadedError where too many wait.
        """
        param = constraint.param
        if not _installed():
            raise RequestError(
                f"'{param}' needs the extra 'guided' (pip install llguidance), which this server lacks",
                param=param,
            )
        text = limits.encoded(constraint)
        name = (constraint.kind, constraint.param, constraint.strict, constraint.whitespace, text)
        key = hashlib.sha256(repr(name).encode()).hexdigest()
        form = await self._form(key, constraint, client)
        if form.process is None:
            raise RequestError(form.refusal, param=param)
        enforced = replace(constraint, value=form.value)
        return Grammar(enforced, partial(form.process.begin, param), form.relaxed)

    async def _form(self, key: str, constraint: Constraint, client: str) -> CompiledForm:
        """Return the form of `key`, compiled once however many ask for it at the same time."""
        while True:
            with self._lock:
                if (known := self._known(key)) is not None:
                    return known
                other = self._compiling.get(key)
                own: Future[None] = Future()
                if other is None:
                    self._compiling[key] = own
            if other is not None:
                await asyncio.shield(asyncio.wrap_future(other))
                continue
            try:
                async with self._lanes.enter(client):
                    form = await self._compile(constraint)
                self._keep(key, form)
                return form
            finally:
                with self._lock:
                    del self._compiling[key]
                own.set_result(None)

    def _known(self, key: str) -> CompiledForm | None:
        refusal = self._refusals.get(key)
        if refusal is not None:
            if time.monotonic() < refusal.until_s:
                return refusal
            del self._refusals[key]
        form = self._forms.get(key)
        if form is None or form.process is None:
            return None
        if form.process.ended:  # in the middle of an answer
            del self._forms[key]
            return None
        self._forms.move_to_end(key)
        return form

    def _keep(self, key: str, form: CompiledForm) -> None:
        with self._lock:
            kept, most = (
                (self._refusals, KEPT_REFUSALS) if form.process is None else (self._forms, KEPT_FORMS)
            )
            kept[key] = form
            while len(kept) > most:
                kept.popitem(last=False)

    async def _compile(self, constraint: Constraint) -> CompiledForm:
        process = await asyncio.get_running_loop().run_in_executor(None, self._fork)
        self._live.add(process)
        try:
            async with asyncio.timeout(limits.COMPILE_WALL_S):
                reply = await process.compile(constraint)
        except (EOFError, OSError, TimeoutError):
            process.kill()
            reason = (
                f"'{constraint.param}' is too complex: it takes more than {limits.COMPILE_CPU_S:g} s of "
                f"processor time or {limits.MEMORY_BYTES >> 20} MiB to compile; simplify it"
            )
            return CompiledForm(refusal=reason, until_s=time.monotonic() + KILLED_FOR_S)
        except BaseException:  # the client has gone, or the server stops
            process.kill()
            raise
        if "error" in reply:
            return CompiledForm(refusal=reply["error"])
        return CompiledForm(process, tuple(reply["relaxed"]), reply["value"])

    def _fork(self) -> FormProcess:
        with self._lock:
            while len(self._live) >= LIVE_FORMS and self._forms:
                self._forms.popitem(last=False)
        if len(self._live) >= LIVE_FORMS:
            raise OverloadedError(
                f"answers follow {LIVE_FORMS} different schemas at the same time; try again shortly"
            )
        return self._host.fork()

    def _vocabulary(self) -> str:
        """Return the tokenizer as JSON text, added tokens included."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RequestError("constrained answers need a fast tokenizer, which this model has not")
        own = copy(backend)
        own.no_padding()
        own.no_truncation()
        return str(own.to_str())


def _installed() -> bool:
    return find_spec("llguidance") is not None
