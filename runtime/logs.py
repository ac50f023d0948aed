"""Log lines: text on a terminal, one JSON object per line elsewhere; both without secrets.

`configure` is called once by each process entry point, nothing here runs at import.
Does not know what is logged (redaction.py: what is cut out of it). Start at `configure`.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Self, TextIO

from runtime.redaction import redact

_UNSHOWABLE = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys((*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)
    | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
)
"""Control characters as pictures of themselves; those that reorder text and lone surrogates as U+FFFD."""
_ESCAPED = {code: f"\\u{code:04x}" for code in _UNSHOWABLE if code >= 0x7F}
"""The same in JSON, whose writer escapes those below a space: no terminal obeys them, a parser reads them."""


def printable(text: str) -> str:
    """Return `text` without what controls a terminal or cannot be encoded; line breaks and tabs stay."""
    return text.translate(_UNSHOWABLE)


def counted(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun: 1 file, 2 files; `many` is an irregular plural."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


class _Redacting(logging.Formatter):
    """Formats for people: time, level, text; every line is redacted, including tracebacks."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))


class _JsonLines(logging.Formatter):
    """Formats for machines: one JSON object per line, with the keys of `extra={"fields": {...}}` added."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": redact(record.getMessage()),
        }
        for key, value in getattr(record, "fields", {}).items():
            line[key] = redact(value) if isinstance(value, str) else value
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str).translate(_ESCAPED)


def configure(*, debug: bool = False, rank: int = 0, stream: TextIO | None = None) -> None:
    """Send log records to `stream` (standard error): plain lines on a terminal, JSON lines elsewhere.

    Ranks above 0 log only from WARNING on, so that a line is printed once for any number of GPUs.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Redacting() if stream.isatty() else _JsonLines())
    level = logging.DEBUG if debug else logging.INFO
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING) if rank else level)
    logging.captureWarnings(True)
    for verbose in ("httpx", "httpcore", "urllib3", "filelock", "fsspec"):
        logging.getLogger(verbose).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of optional kernels at every load
    if not stream.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; a bar tears log lines


@cache
def once(log: logging.Logger, level: int, message: str) -> None:
    """Log `message` the first time that it is given, for facts that are met again and again."""
    log.log(level, "%s", message)


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of the log, to be said again."""

    logger: str
    level: int
    message: str

    def repeat(self) -> None:
        """Log the line."""
        logging.getLogger(self.logger).log(self.level, "%s", self.message)


class Overhearing(logging.Handler):
    """Within: keeps what the logger `name` and those below it log, in `lines`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.lines: list[LogLine] = []
        self._logger = logging.getLogger(name)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(LogLine(record.name, record.levelno, record.getMessage()))

    def __enter__(self) -> Self:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)


class Repeated:
    """Logs an event that clients can cause thousands of times: one line a minute, which counts the others."""

    def __init__(self, log: logging.Logger, *, every_s: float = 60.0) -> None:
        self._log = log
        self._every_s = every_s
        self._next_s = 0.0
        self._unsaid = 0

    def __call__(self, level: int, message: str, *args: object) -> None:
        """Log a line, or count it where the last one is too recent."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more since the last such line)" if self._unsaid else ""
        self._next_s, self._unsaid = now_s + self._every_s, 0
        self._log.log(level, message + more, *args)


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """Silence transformers' progress bars where standard error is no terminal: they tear log lines."""
    from transformers.utils import logging as transformers_logging

    if sys.stderr.isatty():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
