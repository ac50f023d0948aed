"""The processes that serve one model together: rank 0 says what to do, and all of them do it.

Rank 0 has the scheduler, the requests and the port; the others hear one order after another and run the same
step on their share. Orders go over gloo, sums over NCCL where there are GPUs. A rank that ends breaks the
next exchange of the others. Does not know models or how processes are started. Start at `Group`.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

PARTIAL = ("o_proj", "down_proj")
"""Layers that see a part of their inputs: what they give is a part of a sum."""
MEET = datetime.timedelta(minutes=10)
"""For ranks that are all there to connect, and for a sum."""
IDLE = datetime.timedelta(days=3650)
"""Between two orders nobody may have asked for anything; who ends is noticed by the broken connection."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Prepare the model for rows."""

    rows: int
    positions: int


@dataclass(frozen=True, slots=True)
class Add:
    """Read an adapter."""

    name: str
    folder: str
    strength: float


@dataclass(frozen=True, slots=True)
class Remove:
    """Forget an adapter."""

    name: str


@dataclass(frozen=True, slots=True)
class Clear:
    """Zero a slot of the cache, from a position on."""

    slot: int
    start: int


@dataclass(frozen=True, slots=True)
class End:
    """Leave."""


def meeting(file: Path, world: int) -> Any:
    """Return the store through which `world` ranks find each other, in `file`: no port is opened for it."""
    return distributed.FileStore(str(file), world)  # type: ignore[attr-defined]


class Group:
    """One rank's connection to the others."""

    def __init__(self, store: Any, *, rank: int, world: int, device: str) -> None:
        """Meet the others, who must be on their way: blocks until all are here, MEET at most."""
        self.rank, self.world = rank, world
        cuda = device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(device)
        backend = "nccl" if cuda else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=MEET)
        self._orders = distributed.new_group(backend="gloo", timeout=IDLE)

    def tell(self, order: Any) -> None:
        """Have every other rank hear `order`; rank 0's part."""
        distributed.broadcast_object_list([order], src=0, group=self._orders)

    def hear(self) -> Any:
        """Wait for the next order and return it; the others' part."""
        box = [None]
        distributed.broadcast_object_list(box, src=0, group=self._orders)
        return box[0]

    def least(self, number: int) -> int:
        """Return the smallest `number` of any rank, on every rank."""
        found = torch.tensor(number)
        distributed.all_reduce(found, op=distributed.ReduceOp.MIN, group=self._orders)
        return int(found)

    def sum(self, part: Tensor) -> Tensor:
        """Return `part` with those of all ranks added, in place."""
        distributed.all_reduce(part)
        return part

    def side_by_side(self, part: Tensor) -> Tensor:
        """Return the parts (N, F) of all ranks as (N, ranks * F)."""
        parts = [torch.empty_like(part) for _ in range(self.world)]
        distributed.all_gather(parts, part)
        return torch.cat(parts, dim=-1)

    def leave(self) -> None:
        """Close the connections."""
        if distributed.is_initialized():
            distributed.destroy_process_group()


class Summed(nn.Module):
    """A layer of which each rank gives a part of the sum."""

    def __init__(self, inner: nn.Module, team: Group) -> None:
        super().__init__()
        self.inner = inner
        self._team = team

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for this rank's part (..., in) of the inputs."""
        return self._team.sum(self.inner(x))


class Joined(nn.Module):
    """A head of which each rank has a part of the vocabulary."""

    def __init__(self, inner: nn.Module, team: Group) -> None:
        super().__init__()
        self.inner = inner
        self._team = team

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (..., V) for x (..., hidden)."""
        part = self.inner(x).contiguous()
        return self._team.side_by_side(part.view(-1, part.shape[-1])).view(*part.shape[:-1], -1)
