"""`runtime serve --check`: loads everything that serving needs, once, and measures it.

Loads as the server does and generates one token; opens no port. Start at `check`.
"""

import asyncio
import time
from dataclasses import dataclass

from runtime import hardware, oci
from runtime.serving import loading
from runtime.serving.settings import ServeConfig


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Measurements of one configuration."""

    model: str
    weights: str
    """Type, size and device of the weights."""
    context_tokens: int
    """Prompt and answer together, per request."""
    rows: int
    """Sequences (answers) at the same time, at most."""
    adapters: tuple[str, ...]
    refused: tuple[str, ...]
    """Configured adapters that would not be served; the log says why."""
    load_s: float
    first_token_s: float
    """From a short prompt to one token, the first time."""
    peak_memory_bytes: int
    """Peak host memory of this process."""


def check(config: ServeConfig, *, access: oci.Access) -> CheckResult:
    """Load what `config` names, generate one token, and return the measurements.

    Raises the failures of serving: ConfigError, CapacityError, TransientError, UnavailableError.
    """
    started = time.monotonic()
    served = loading.load(config, access)
    loaded = time.monotonic()
    try:
        asyncio.run(served.first_token())
        answered = time.monotonic()
        names = served.engine.stats().adapters
        return CheckResult(
            model=served.name,
            weights=served.weights,
            context_tokens=served.tokenizer.context_tokens,
            rows=served.engine.max_sequences,
            adapters=names,
            refused=tuple(served.refused_adapters),
            load_s=round(loaded - started, 2),
            first_token_s=round(answered - loaded, 2),
            peak_memory_bytes=hardware.peak_resident_bytes(),
        )
    finally:
        served.engine.close()
        served.tokenizer.close()
