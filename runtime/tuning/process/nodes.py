"""The nodes of one job: how many, which one this is, and the rendezvous endpoint.

Read from flags, or from the variables that a cluster sets in its pods. Knows neither torch nor processes.
Start at `Nodes.read`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from runtime import ports
from runtime.errors import ConfigError

RENDEZVOUS_TIMEOUT_S = 3 * 3600
"""Longest wait for the other nodes: each fetches its data first."""

_COUNT = ("PET_NNODES", "NNODES")
_RANK = ("PET_NODE_RANK", "NODE_RANK", "JOB_COMPLETION_INDEX")
_HOST = ("PET_MASTER_ADDR", "MASTER_ADDR")
_PORT = ("PET_MASTER_PORT", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Nodes:
    """This node's rank among those of the job, and how to reach node 0."""

    count: int = 1
    rank: int = 0
    """0 hosts the rendezvous, writes the adapter and publishes it."""
    host: str = "localhost"
    """Name or address of node 0, as the others reach it."""
    port: int = ports.RENDEZVOUS

    @classmethod
    def read(
        cls,
        environ: Mapping[str, str],
        *,
        count: int | None = None,
        rank: int | None = None,
        endpoint: str | None = None,
    ) -> Self:
        """Return what the arguments give, else the environment; one node where neither does.

        Understood are torchrun's own variables (PET_*, as Kubeflow's Trainer sets them), those of a
        PyTorchJob (MASTER_ADDR with WORLD_SIZE and RANK counting pods) and of an indexed Job
        (JOB_COMPLETION_INDEX, with NNODES and MASTER_ADDR in its manifest).
        endpoint: HOST or HOST:PORT of node 0.
        """
        pods = ("WORLD_SIZE", "RANK") if environ.get("MASTER_ADDR") and not environ.get("LOCAL_RANK") else ()
        count = count or _number(environ, (*_COUNT, *pods[:1])) or 1
        if count == 1:
            _refuse_alone(rank, endpoint)
            return cls()
        if rank is None:
            rank = _number(environ, (*_RANK, *pods[1:]))
        if rank is None or not 0 <= rank < count:
            raise ConfigError(
                f"node rank is {rank} of {count} nodes, expected 0 to {count - 1}; give --node-rank "
                f"or set {_RANK[1]}"
            )
        if endpoint is None:
            host, port = _first(environ, _HOST), _number(environ, _PORT)
        else:
            host, port = _split(endpoint)
        if not host:
            raise ConfigError(
                f"{count} nodes have no rendezvous endpoint; give --rdzv-endpoint HOST:{ports.RENDEZVOUS} "
                f"of node 0 or set {_HOST[1]}"
            )
        return cls(count, rank, host, port or ports.RENDEZVOUS)

    @property
    def is_main(self) -> bool:
        """Whether this node writes and publishes for all."""
        return self.rank == 0

    def ranks(self, processes: int) -> range:
        """Return the ranks of this node's `processes`, of which every node has as many."""
        return range(self.rank * processes, (self.rank + 1) * processes)

    def torchrun_options(self) -> list[str]:
        """Return these settings as options of torchrun."""
        if self.count == 1:
            return ["--standalone"]  # a free port that torchrun chooses
        # Not c10d: it assigns ranks in the order of addresses, and rank 0 has to be where the output is.
        return [
            "--nnodes", str(self.count), "--node-rank", str(self.rank),
            "--master-addr", self.host, "--master-port", str(self.port),
            "--rdzv-conf", f"timeout={RENDEZVOUS_TIMEOUT_S}",
        ]  # fmt: skip


SINGLE_NODE = Nodes()


def _refuse_alone(rank: int | None, endpoint: str | None) -> None:
    """Refuse flags that ask for several nodes where there is one."""
    flag = f"--node-rank {rank}" if rank else f"--rdzv-endpoint {endpoint}" if endpoint is not None else ""
    if flag:
        raise ConfigError(f"{flag}: this job has one node; give --nnodes, the number of all")


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((environ[name] for name in names if environ.get(name)), None)


def _number(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    name = next((name for name in names if environ.get(name)), None)
    if name is None:
        return None
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"{name} is {environ[name]!r}, expected a whole number") from None


def _split(endpoint: str) -> tuple[str, int | None]:
    """Return host and port of HOST, HOST:PORT, ADDRESS or [ADDRESS]:PORT (IPv6)."""
    host, _, port = endpoint.rpartition(":") if not endpoint.endswith("]") else (endpoint, "", "")
    if not host or (":" in host and not host.startswith("[")):
        return endpoint, None
    if port and not port.isdecimal():
        raise ConfigError(
            f"--rdzv-endpoint is {endpoint!r}, expected HOST:PORT such as trainer-0:{ports.RENDEZVOUS}"
        )
    return host.strip("[]"), int(port) if port else None
