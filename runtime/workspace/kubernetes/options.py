"""What `runtime manifest` is told beside the file: image, GPUs, quantities, claims. Start at `PodOptions`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.hardware import Hardware


@dataclass(frozen=True, slots=True)
class PodOptions:
    """What the objects need and a Workspace does not hold."""

    image: str
    """This project's image, as the cluster's nodes pull it."""
    machine: Hardware | None = None
    """The GPUs of a node; None takes those of the instance type."""
    gpus: int | None = None
    """How many of them a Workspace has on a node; None takes all, 0 is for nodes without any."""
    image_volumes: bool = False
    """Mount adapter images as volumes (Kubernetes 1.35, or the ImageVolume feature from 1.33 on)."""
    config: Path | None = None
    """A training_config.yaml or inference_config.yaml, in place of the ConfigMap that the Workspace names."""
    flags: tuple[str, ...] = ()
    """Further flags of the server."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings that they stand for."""
    cpu: str | None = None
    """Quantities to request; None takes an estimate."""
    memory: str | None = None
    cache_claim: str | None = None
    """PersistentVolumeClaim for downloaded weights; None downloads them again in each pod."""
    api_key: tuple[str, str] | None = None
    """Name and key of the Secret with the API key; None serves everybody."""
    api_key_file: tuple[str, str] | None = None
    """Name and key of the Secret with a file of several API keys."""
