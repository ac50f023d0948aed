"""What the server and the process of one replica tell each other, pickled, over a pair of sockets.

The server sends ReplicaTask first and gets ReplicaReady, or a Failure; then requests go one way and tokens
the other, those of one engine step together. Does not know engines or processes. Start at `ReplicaTask`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import Failure
from runtime.serving.engine.protocol import Constraint, Request, Stats, Token
from runtime.serving.settings import ServeConfig


@dataclass(frozen=True, slots=True)
class ReplicaTask:
    """What a replica has to load."""

    number: int
    """0 for the first."""
    config: ServeConfig
    """Its model with a `path`: the server has downloaded it."""


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica has loaded the model and generated a first token."""

    context_tokens: int
    weights: str
    """Type, size and device of the weights."""
    generation_config: dict[str, Any]
    """The model's defaults."""
    stats: Stats


@dataclass(frozen=True, slots=True)
class SubmitRequest:
    """Answer `request`; `number` stands for it from now on."""

    number: int
    request: Request
    """Without its grammar, which cannot be pickled."""
    constraint: Constraint | None
    """What to compile the grammar from."""


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Stop a request; its end comes as "cancelled"."""

    number: int


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Read an adapter; answered with AdapterDone."""

    name: str
    folder: Path
    strength: float


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Remove an adapter that no request uses; answered with AdapterDone."""

    name: str


@dataclass(frozen=True, slots=True)
class AdapterDone:
    """The last LoadAdapter or UnloadAdapter is carried out, or has failed."""

    failure: Failure | None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Tokens, ends and failures of one step, each with the number of its request."""

    items: list[tuple[int, Token | Failure]]


@dataclass(frozen=True, slots=True)
class CloseReplica:
    """Cancel what is in flight and end the process."""
