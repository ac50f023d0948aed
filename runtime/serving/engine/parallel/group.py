"""The group of processes that serve one model together: rank 0 broadcasts commands, and all ranks run them.

Rank 0 has the scheduler, the requests and the port; the others receive one command after another and run the
same step on their shard. Commands go over gloo, all-reduces over NCCL where there are GPUs. A rank that ends
breaks the next exchange of the others. Does not know models or how processes are started. Shapes: `N` flat
tokens, `F` output features of one rank, `V` vocabulary. Start at `Group`.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from runtime.serving.engine.extents import Move

ROW_PARALLEL = ("o_proj", "down_proj")
"""Layers divided along their inputs: their outputs are summed over the ranks."""
RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=10)
"""How long ranks that are all running may take to connect, or for one all-reduce."""
COMMAND_TIMEOUT = datetime.timedelta(days=3650)
"""Any time may pass between two commands; a rank that ends is noticed by its broken connection."""


@dataclass(frozen=True, slots=True)
class AddAdapter:
    """Read an adapter."""

    name: str
    folder: str
    strength: float


@dataclass(frozen=True, slots=True)
class RemoveAdapter:
    """Drop an adapter."""

    name: str


@dataclass(frozen=True, slots=True)
class MovePositions:
    """Copy within the key-value pool, in this order."""

    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class ClearPositions:
    """Zero `count` positions of arena `kind` of the key-value pool from `start` on."""

    kind: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process."""


def rendezvous(file: Path, world: int) -> Any:
    """Return the store through which `world` ranks find each other, in `file`: no port is opened for it."""
    return distributed.FileStore(str(file), world)  # type: ignore[attr-defined]


class Group:
    """One rank's connection to the others."""

    def __init__(self, store: Any, *, rank: int, world: int, device: str) -> None:
        """Connect to the other ranks, which must be starting: waits RENDEZVOUS_TIMEOUT at most."""
        self.rank, self.world = rank, world
        cuda = device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(device)
        backend = "nccl" if cuda else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=RENDEZVOUS_TIMEOUT
        )
        self._commands = distributed.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)

    def broadcast(self, command: Any) -> None:
        """Send `command` to every other rank; called on rank 0."""
        distributed.broadcast_object_list([command], src=0, group=self._commands)

    def receive(self) -> Any:
        """Wait for the next command of rank 0 and return it; called on the others."""
        received = [None]
        distributed.broadcast_object_list(received, src=0, group=self._commands)
        return received[0]

    def all_reduce_min(self, number: int) -> int:
        """Return the smallest `number` of any rank, on every rank."""
        smallest = torch.tensor(number)
        distributed.all_reduce(smallest, op=distributed.ReduceOp.MIN, group=self._commands)
        return int(smallest)

    def all_reduce(self, summand: Tensor) -> Tensor:
        """Return the sum of every rank's `summand`, computed in place."""
        distributed.all_reduce(summand)
        return summand

    def all_gather(self, own: Tensor) -> Tensor:
        """Return every rank's `own` (N, F) side by side: (N, ranks * F)."""
        gathered = [torch.empty_like(own) for _ in range(self.world)]
        distributed.all_gather(gathered, own)
        return torch.cat(gathered, dim=-1)

    def close(self) -> None:
        """Close the connections."""
        if distributed.is_initialized():
            distributed.destroy_process_group()


class RowParallel(nn.Module):
    """A linear layer whose inputs are divided over the ranks and whose outputs are summed."""

    def __init__(self, inner: nn.Module, group: Group) -> None:
        super().__init__()
        self.inner = inner
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out), summed, for this rank's (..., in / ranks) of the inputs."""
        return self._group.all_reduce(self.inner(x))


class VocabParallel(nn.Module):
    """An output embedding whose vocabulary is divided over the ranks."""

    def __init__(self, inner: nn.Module, group: Group) -> None:
        super().__init__()
        self.inner = inner
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (..., V) for x (..., hidden)."""
        own = self.inner(x).contiguous()
        return self._group.all_gather(own.view(-1, own.shape[-1])).view(*own.shape[:-1], -1)
