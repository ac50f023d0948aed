"""The failures that clients of an engine get: each message once, for all engines.

Does not know models, requests or HTTP; the exception types decide the HTTP status (errors.py).
"""

import logging
import signal

from runtime.errors import (
    CapacityError,
    ConfigError,
    Failure,
    OverloadedError,
    RequestError,
    TooLargeError,
    UnavailableError,
    UnknownModelError,
    is_out_of_memory,
    one_line,
)
from runtime.serving.engine.protocol import Request

log = logging.getLogger(__name__)


def stopped() -> UnavailableError:
    """Return the failure of requests to an engine that is closed or has given up."""
    return UnavailableError("the engine has stopped")


def died() -> UnavailableError:
    """Return the failure of requests whose engine ran in a process that has ended."""
    return UnavailableError("the engine has died; the server's log has the reason")


def how_ended(status: int) -> str:
    """Return how a process ended, by the status that Popen gives it."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def queue_full(waiting: int) -> OverloadedError:
    """Return the failure of a request that found the queue full, `waiting` others before it."""
    return OverloadedError(f"{waiting} requests are waiting already; try again shortly")


def not_loaded(adapter: str) -> UnknownModelError:
    """Return the failure of a request for an adapter that the engine does not hold."""
    return UnknownModelError(f"adapter '{adapter}' is not loaded")


def already_loaded(adapter: str) -> ConfigError:
    """Return the failure of adding an adapter under a name that is in use."""
    return ConfigError(f"adapter {adapter}: is already loaded; remove it first")


def does_not_fit(adapter: str, reason: str) -> ConfigError:
    """Return the failure of adding an adapter that this model cannot use."""
    return ConfigError(f"adapter {adapter}: does not fit this model: {reason}")


def unread_elsewhere(adapter: str) -> CapacityError:
    """Return the failure of adding an adapter that another process of the server could not read."""
    return CapacityError(f"adapter {adapter}: another process of this server could not read it")


def needs_too_much_memory(tokens: int) -> TooLargeError:
    """Return the failure of a request that ran out of memory at its `tokens`-th token."""
    return TooLargeError(
        f"this request ran out of memory at token {tokens}, in the smallest pass that the server runs: send "
        "a shorter prompt or ask for fewer tokens",
        code="out_of_memory",
    )


def larger_than_the_pool(request: Request, tokens: int) -> RequestError:
    """Return the failure of a request that would not fit even alone, into room for `tokens`."""
    return RequestError(
        f"the prompt has {len(request.prompt_ids)} tokens and the answer may have "
        f"{request.sampling.max_new_tokens}, but there is memory for {tokens} together: send a shorter "
        "prompt or ask for fewer tokens",
        code="context_length_exceeded",
    )


def out_of_memory() -> UnavailableError:
    """Return the failure of a request so short that not its length is why memory ran out."""
    return UnavailableError("the server is out of memory; try again shortly", code="out_of_memory")


def no_memory_for_adapter(adapter: str) -> CapacityError:
    """Return the failure of adding an adapter that does not fit beside the model and what it serves."""
    return CapacityError(
        f"adapter {adapter}: no memory is left for it; unload another adapter first, or start the server "
        "with fewer rows or a shorter context (limits.rows, limits.context_tokens)"
    )


def rank_out_of_memory(rank: int, error: Exception) -> CapacityError:
    """Return why a server that divides its model ends: `rank` ran out of memory, as `error` says."""
    return CapacityError(
        f"rank {rank}: out of memory, which ends the server: lower limits.rows or limits.context_tokens, or "
        f"divide the model among more GPUs ({one_line(error)})"
    )


def invalid_output() -> UnavailableError:
    """Return the failure of a request whose logits are not finite."""
    return UnavailableError("model output contains NaN or Inf for this prompt")


def failed() -> UnavailableError:
    """Return the failure of a request for a reason that is in the log and not for clients."""
    return UnavailableError("the engine failed on this request; its log says why")


def of(error: Exception) -> Failure:
    """Return the failure that a client gets for `error`; what clients must not see goes to the log."""
    if isinstance(error, Failure):
        return error
    if is_out_of_memory(error):
        return out_of_memory()
    log.error("A request failed in the engine", exc_info=error)
    return failed()
