"""The processes of one job, and the collectives between them.

Works for a single process (no process group) and under torchrun (gloo on CPUs, NCCL on GPUs) alike.
Does not know what is trained. Start at `Ranks`.
"""

import contextlib
import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from runtime.errors import ConfigError, Failure, StoppedError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=3)
"""Longest wait of one rank for another: rank 0 may be fetching data or evaluating meanwhile."""

_VARIABLES = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's rank, and the world it belongs to."""

    rank: int = 0
    local_rank: int = 0
    """Rank on this machine: the number of its GPU."""
    world_size: int = 1
    local_world_size: int = 1
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
    def is_main(self) -> bool:
        """Whether this process writes and publishes for all."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this process fetches for the others of its node: no disk need be shared."""
        return self.local_rank == 0

    @property
    def node(self) -> int:
        """Number of this machine among those of the job, which have as many processes each."""
        return self.rank // self.local_world_size

    @contextlib.contextmanager
    def said_once(self) -> Iterator[None]:
        """Do what gives the same warnings on every rank: one process of each node logs them. Errors stay."""
        root = logging.getLogger()
        level = root.level
        if not self.is_local_main:
            root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)

    def init_process_group(self, device: str) -> None:
        """Meet the other ranks; does nothing for a single process."""
        import torch
        from torch import distributed

        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        if self.world_size > 1 and not distributed.is_initialized():
            backend = "nccl" if device.startswith("cuda") else "gloo"
            distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)

    def destroy_process_group(self) -> None:
        """Close what `init_process_group` opened."""
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()

    def barrier(self) -> None:
        """Return once every rank has called this."""
        from torch import distributed

        if self.world_size > 1:
            distributed.barrier()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do what some ranks do for the others: all go on, or all end with the failure that one of them has.

        One that is stopped ends at once; the others may be on machines that are not.
        """
        failure: Failure | None = None
        try:
            yield
        except StoppedError:
            raise
        except Failure as error:
            failure = error
        failed = [found for found in (failure, *self._gather_everywhere(failure)) if found is not None]
        if failed:
            raise failed[0]

    def _gather_everywhere(self, value: T) -> list[T]:
        """Return every rank's `value` on every rank."""
        from torch import distributed

        objects = [value] * self.world_size
        if self.world_size > 1:
            distributed.all_gather_object(objects, value)
        return objects

    def all_reduce_sum(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return `values` summed over all ranks, in place."""
        from torch import distributed

        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def all_reduce_max(self, count: int, device: str) -> int:
        """Return the largest `count` of any rank."""
        import torch
        from torch import distributed

        if self.world_size == 1:
            return count
        largest = torch.tensor(count, device=device)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        return int(largest)

    def any_of(self, flags: Sequence[bool], device: str) -> list[bool]:
        """Return for each of `flags` whether it is set on any rank; one process does not ask its device."""
        import torch
        from torch import distributed

        if self.world_size == 1:
            return list(flags)
        set_on = torch.tensor([int(flag) for flag in flags], device=device)
        distributed.all_reduce(set_on)
        return [count > 0 for count in set_on.tolist()]

    def broadcast(self, value: T) -> T:
        """Return rank 0's `value` on every rank."""
        from torch import distributed

        objects = [value]
        if self.world_size > 1:
            distributed.broadcast_object_list(objects)
        return objects[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value` on rank 0, an empty list on the others."""
        from torch import distributed

        if self.world_size == 1:
            return [value]
        objects: list[T] | None = [value] * self.world_size if self.is_main else None
        distributed.gather_object(value, objects)
        return objects or []
