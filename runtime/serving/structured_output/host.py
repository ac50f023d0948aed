"""The processes that llguidance runs in: a host with the vocabulary, and a copy of it for each form.

The host reads the vocabulary once and forks for each form, so that a form costs milliseconds and its end
costs nobody else anything. A form's process compiles it, then computes masks for all answers that follow it;
the kernel ends it where one step takes too much processor time or memory. Runs as `python -m` this module,
with a socket as standard input. Does not know HTTP or engines. Start at `main`, then `FormWorker.run`.
"""

import json
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from runtime import child, forks
from runtime.errors import RequestError, one_line
from runtime.serving.engine.protocol import Constraint
from runtime.serving.structured_output import forms, limits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMMAND = struct.Struct("<cII")
"""To a form's process: what, the answer's number, a token."""
BEGIN, TAKE, END = b"B", b"T", b"E"
REPLY = struct.Struct("<IB")
"""From a form's process: the answer's number and 1 where a mask follows, 0 where a text says why not."""
NICENESS = 5
"""Of what computes masks, which answers wait for: below the server's threads where processors are short."""
COMPILE_NICENESS = 10
"""Of what compiles, which only its client waits for: many forms at once must not slow what is answered."""


def main() -> int:
    """Read the vocabulary, then fork for each form until the server closes its end."""
    control = child.begin()
    try:
        head = json.loads(forks.read(control))
        tokenizer = forks.read(control).decode()
    except (EOFError, OSError):  # the server has ended by now
        return 0
    from llguidance import LLTokenizer

    tokens = LLTokenizer(tokenizer, eos_token=head["end_ids"] or None)
    del tokenizer
    forks.serve(control, lambda channel: FormWorker(channel, tokens).run())
    return 0


class FormWorker:
    """One form and the answers that follow it, in a process that the host has forked."""

    def __init__(self, channel: socket.socket, tokens: "LLTokenizer") -> None:
        self._channel = channel
        self._tokens = tokens
        self._answers: dict[int, LLMatcher] = {}

    def run(self) -> None:
        """Compile what comes first, then answer commands until the server closes its end."""
        try:
            forks.limit_memory(limits.MEMORY_BYTES, NICENESS)
            forks.send(self._channel, json.dumps({"pid": os.getpid()}).encode())
            job = json.loads(forks.read(self._channel))
            reply, matcher = self._compile_below(Constraint(**job))
            forks.send(self._channel, json.dumps(reply).encode())
            while matcher is not None:
                self._carry_out(matcher, *COMMAND.unpack(forks.exactly(self._channel, COMMAND.size)))
        except (EOFError, OSError):  # the server has closed its end
            return

    def _compile_below(self, constraint: Constraint) -> "tuple[dict[str, Any], LLMatcher | None]":
        """Compile in a thread, which ends with its niceness: without privileges none is taken back."""

        def compile_() -> "tuple[dict[str, Any], LLMatcher | None]":
            os.nice(COMPILE_NICENESS - NICENESS)  # of this thread alone, on Linux
            return self._compile(constraint)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(compile_).result()

    def _compile(self, constraint: Constraint) -> "tuple[dict[str, Any], LLMatcher | None]":
        """Return what the server is told, and the matcher of a form that can be followed."""
        try:
            with forks.processor_time(limits.COMPILE_CPU_S):
                form = forms.form_of(constraint)
                matcher = forms.matcher(form, self._tokens, constraint)
                forms.mask(matcher, constraint)
        except RequestError as error:
            return {"error": str(error)}, None
        except Exception as error:  # llguidance's own; a form is not worth the server's end
            return {"error": f"'{constraint.param}': {one_line(error)}"}, None
        matcher.reset()
        return {"relaxed": form.relaxed, "value": form.value}, matcher

    def _carry_out(self, matcher: "LLMatcher", command: bytes, answer: int, token: int) -> None:
        if command == END:
            self._answers.pop(answer, None)
            return
        with forks.processor_time(limits.MASK_CPU_S):
            try:
                if command == BEGIN:
                    self._answers[answer] = matcher.deep_copy()
                else:
                    self._answers[answer].consume_token(token)
                mask = self._answers[answer].compute_bitmask()
                error = self._answers[answer].get_error()
            except Exception as failure:  # llguidance's own
                error = str(failure)
        self._reply(answer, not error, error.encode() if error else mask)

    def _reply(self, answer: int, fine: bool, payload: bytes) -> None:
        forks.send(self._channel, REPLY.pack(answer, fine) + payload)


if __name__ == "__main__":
    raise SystemExit(main())
