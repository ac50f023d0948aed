"""The process that chat templates run in: a host with Jinja, and a copy of it for each template.

A copy compiles one template and renders conversations until the server closes its end; the kernel ends it
where one takes too much processor time or memory. Runs as `python -m` this module, with a socket as standard
input. Does not know models or requests. Start at `main`, then `work`.
"""

import json
import resource
import signal
import socket

import jinja2

from runtime import child, forks
from runtime.chat_template.protocol import (
    BROKEN,
    CPU_S,
    ENCODING,
    LONG,
    MARKED,
    MEMORY_BYTES,
    MOST_SAID,
    REFUSED,
    TEXT,
)
from runtime.chat_template.sandbox import OutputLimitError, Sandbox

_TAG = "continued8067142935 "
"""Stands behind the text that an answer continues; what trims it trims the space, too."""


def main() -> int:
    """Fork for each template until the server closes its end."""
    forks.serve(child.begin(), work)
    return 0


def work(channel: socket.socket) -> None:
    """Compile the template that comes first, then render until the other end is closed."""
    try:
        forks.limit_memory(MEMORY_BYTES, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        sandbox = _compiled(channel, forks.reply(channel).decode(*ENCODING))
        while sandbox is not None:
            job = forks.reply(channel)
            signal.setitimer(signal.ITIMER_PROF, CPU_S)  # which the kernel sends, and no code can prevent
            forks.send(channel, _rendered(sandbox, job))
    except (EOFError, OSError, MemoryError):  # the server has closed its end; or it sees that this one ends
        return


def _compiled(channel: socket.socket, template: str) -> Sandbox | None:
    sandbox = None
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        sandbox = Sandbox(template)
        reply = TEXT + json.dumps(sandbox.names()).encode()
    except jinja2.TemplateSyntaxError as error:
        reply = BROKEN + f"at line {error.lineno}: {error.message}"[:MOST_SAID].encode(*ENCODING)
    except (RecursionError, SyntaxError, ValueError) as error:  # of Python, which Jinja compiles to
        reply = BROKEN + type(error).__name__.encode()
    forks.send(channel, reply)
    return sandbox


def _rendered(sandbox: Sandbox, message: bytes) -> bytes:
    try:
        job = json.loads(message.decode(*ENCODING))
        turns, most = job["turns"], job["most"]
        if job["continues"]:
            turns[-1]["content"] += _TAG
            most += len(_TAG)
        text, answers = sandbox.render(turns, job["variables"], most=most)
        if job["marked"]:
            return MARKED + json.dumps([text, answers]).encode()
        return TEXT + (_continued(text) if job["continues"] else text).encode(*ENCODING)
    except OutputLimitError:
        return LONG
    except MemoryError:
        raise
    except Exception as error:  # templates refuse roles, orders and variables by raising anything
        return REFUSED + str(error)[:MOST_SAID].encode(*ENCODING)


def _continued(text: str) -> str:
    """Return `text` up to where its last message's ends."""
    at = text.rfind(_TAG.rstrip())
    if at < 0:
        raise jinja2.TemplateError("it does not show the whole text of the last message, to continue it")
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()


if __name__ == "__main__":
    raise SystemExit(main())
