"""The processes of one job and what they say to each other.

Works alone (world 1, no process group) and under torchrun (gloo on CPUs, NCCL on GPUs) alike.
Does not know what is trained. Start at `Ranks`.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

JOIN_TIMEOUT = datetime.timedelta(hours=3)
"""Longest wait of one rank for another: rank 0 may be fetching data or evaluating meanwhile."""

_VARIABLES = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those of the job."""

    rank: int = 0
    local_rank: int = 0
    """Place on this machine: the number of its GPU."""
    world: int = 1
    local_world: int = 1
    """Processes on this machine, which share its memory."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Self:
        """Read torchrun's (and accelerate's) variables; one process where they are absent."""
        try:
            rank, local, world, here = (int(environ.get(name) or default) for name, default in _VARIABLES)
        except ValueError:
            raise ConfigError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers") from None
        return cls(rank, local, world, here)

    @property
    def first(self) -> bool:
        """Whether this process writes and publishes for all."""
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this process fetches for the others of its node: no disk need be shared."""
        return self.local_rank == 0

    def join(self, device: str) -> None:
        """Meet the other ranks; returns at once when there are none."""
        import torch
        from torch import distributed

        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        if self.world > 1 and not distributed.is_initialized():
            backend = "nccl" if device.startswith("cuda") else "gloo"
            distributed.init_process_group(backend, timeout=JOIN_TIMEOUT)

    def leave(self) -> None:
        """Close what `join` opened."""
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()

    def wait(self) -> None:
        """Return once every rank is here."""
        from torch import distributed

        if self.world > 1:
            distributed.barrier()

    def total(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return `values` summed over all ranks."""
        from torch import distributed

        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool, device: str) -> bool:
        """Return whether `flag` holds on any rank: all of them learn the same at the same step."""
        import torch

        if self.world == 1:
            return flag
        return bool(self.total(torch.tensor([int(flag)], device=device)).item())

    def most(self, count: int, device: str) -> int:
        """Return the largest `count` of any rank."""
        import torch
        from torch import distributed

        found = torch.tensor(count, device=device)
        if self.world > 1:
            distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return int(found)

    def told(self, value: T) -> T:
        """Return rank 0's `value` on every rank."""
        from torch import distributed

        box = [value]
        if self.world > 1:
            distributed.broadcast_object_list(box)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """Return every rank's `value` on rank 0, nothing on the others."""
        from torch import distributed

        if self.world == 1:
            return [value]
        box: list[T] | None = [value] * self.world if self.first else None
        distributed.gather_object(value, box)
        return box or []
