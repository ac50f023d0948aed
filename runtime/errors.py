"""Every failure a user can meet, as one tree, with its exit status and its HTTP status.

    Failure                     1     500   our own bug, or an unexpected error
    ├── ConfigError             2     400   a manifest, file, flag or variable is wrong
    ├── DataError               3           data is unreachable or invalid
    │   └── TemplateRefusedError    3           a chat template does not render a conversation
    │       ├── TemplateLongError   3           its text is too long
    │       └── TemplateLimitError  3           it takes too much time or memory
    ├── DivergedError           4           the loss or a weight became NaN or Inf
    ├── RegistryError           5     502   a registry refused us, or broke its protocol
    ├── CapacityError           6     507   does not fit: GPU memory, host memory, disk
    ├── TransientError         75     503   another try would probably work
    ├── StoppedError          143           SIGTERM, after a checkpoint
    └── RequestError                  400   one HTTP request cannot be served
        ├── ContextLengthError        400   prompt and answer are longer than the model's context
        ├── ForbiddenError            403   this server does not offer it
        ├── UnknownModelError         404
        ├── DeadlineError             408   the body or the answer took too long
        ├── TooLargeError             413   its body, or the memory that it takes
        ├── ContentCodingError        415   its body is compressed in a way that is not read here
        ├── OverloadedError           429   the waiting queue is full
        ├── RateLimitError            429   the key's requests or tokens of this minute are used up
        ├── ClientGoneError           499   the client has disconnected
        └── UnavailableError          503   loading, draining or broken

A message says what, which value, what was expected and what to do, in one line, and never holds a
secret. Does not know argparse, HTTP or Kubernetes: the edges read `EXIT_CODES` and `HTTP_STATUSES`.
"""

import errno


class Failure(Exception):
    """Root of every expected failure; its text can be shown to the user unchanged."""


class ConfigError(Failure):
    """A manifest, configuration file, flag or environment variable is wrong."""


class DataError(Failure):
    """Training data cannot be reached, read or used."""


class TemplateRefusedError(DataError):
    """A chat template does not render a conversation; the text is the template's own."""


class TemplateLongError(TemplateRefusedError):
    """The text that a chat template makes of a conversation is longer than was asked for."""


class TemplateLimitError(TemplateRefusedError):
    """A chat template takes more processor time or memory than it may."""


class DivergedError(Failure):
    """Training produced a NaN or an infinity; the last good checkpoint stays."""


class RegistryError(Failure):
    """A registry refused the credentials or the request, or violated its protocol."""


class CapacityError(Failure):
    """The job does not fit into the available memory or disk space."""


class TransientError(Failure):
    """A network or service failed in a way that may pass: another try may succeed."""


class StoppedError(Failure):
    """The process received a signal to stop and has saved what it could."""


class RequestError(Failure):
    """One HTTP request cannot be served; `param` names the field at fault, `code` is OpenAI's."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """Prompt and answer are longer than the model's context."""

    def __init__(
        self,
        most_tokens: int,
        prompt_tokens: int,
        new_tokens: int | None = None,
        *,
        param: str | None = None,
        or_more: bool = False,
    ):
        """In OpenAI's words, by which agents recognise that they have to shorten their history."""
        least = "at least " if or_more else ""
        found, reduce = f"your messages resulted in {least}{prompt_tokens} tokens", "messages"
        if new_tokens is not None:
            found = (
                f"you requested {prompt_tokens + new_tokens} tokens ({prompt_tokens} in the messages, "
                f"{new_tokens} in the completion)"
            )
            reduce = "messages or completion"
        super().__init__(
            f"This model's maximum context length is {most_tokens} tokens. However, {found}. "
            f"Please reduce the length of the {reduce}.",
            param=param,
            code="context_length_exceeded",
        )


class ForbiddenError(RequestError):
    """This server does not offer what is requested, to any client."""


class UnknownModelError(RequestError):
    """The request names a model or adapter that is not served here."""


class DeadlineError(RequestError):
    """The request's body, or its answer, was not complete in time."""


class ClientGoneError(RequestError):
    """The client closed the connection before its answer was complete."""


class TooLargeError(RequestError):
    """The request body is larger than the server accepts, or its tokens take more memory than there is."""


class ContentCodingError(RequestError):
    """The request body is compressed in a way that is not read here."""


class OverloadedError(RequestError):
    """The waiting queue is full; the client should try again shortly."""


class RateLimitError(RequestError):
    """The requests or tokens that the key may use in a minute are used up."""

    def __init__(self, message: str, *, retry_after_s: float):
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after_s = retry_after_s


class UnavailableError(RequestError):
    """The server is loading, draining or broken."""


EXIT_CODES: dict[type[Failure], int] = {
    Failure: 1,
    ConfigError: 2,
    DataError: 3,
    DivergedError: 4,
    RegistryError: 5,
    CapacityError: 6,
    TransientError: 75,
    StoppedError: 143,
}
"""Process exit status by failure; podFailurePolicy rules are written against these numbers."""

HTTP_STATUSES: dict[type[Failure], int] = {
    Failure: 500,
    ConfigError: 400,
    RegistryError: 502,
    CapacityError: 507,
    TransientError: 503,
    RequestError: 400,
    ForbiddenError: 403,
    UnknownModelError: 404,
    DeadlineError: 408,
    TooLargeError: 413,
    ContentCodingError: 415,
    OverloadedError: 429,
    RateLimitError: 429,
    ClientGoneError: 499,
    UnavailableError: 503,
}
"""HTTP status by failure."""

RETRIABLE = frozenset({TransientError, StoppedError})
"""Failures after which the same command may succeed unchanged."""


def one_line(said: object, most: int = 300) -> str:
    """Return at most `most` characters of what an error or another program says, in one line.

    Without what a terminal would obey: characters that are not printed are replaced.
    """
    text = " ".join(str(said)[: 8 * most].split())[:most]
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "alloc_failed",
)
"""In the texts of torch's RuntimeErrors: CUDA's and its own allocators, C++, cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error`, of Python, torch or a library below it, says that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    # oneDNN's whole text where there is no memory for what it planned; it has others for what it cannot do
    return isinstance(error, RuntimeError) and (
        text == "could not create a primitive" or any(part in text for part in _OUT_OF_MEMORY)
    )


def kind_of_exit(status: int) -> type[Failure]:
    """Return the failure that a process of this project ended with, by its exit status; else Failure."""
    return next((kind for kind, code in EXIT_CODES.items() if code == status), Failure)


def exit_code(failure: Failure) -> int:
    """Return the process exit status for `failure`, that of its nearest listed ancestor."""
    return _nearest(EXIT_CODES, failure)


def http_status(failure: Failure) -> int:
    """Return the HTTP status for `failure`, that of its nearest listed ancestor."""
    return _nearest(HTTP_STATUSES, failure)


def _nearest(table: dict[type[Failure], int], failure: Failure) -> int:
    return next(table[kind] for kind in type(failure).__mro__ if kind in table)
