"""The paths at which KAITO's controllers, of all versions, mount files in the pod.

Knows paths, not the contents of files. Start at `Mounts`; tests give it another root than "/".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime import adapters
from runtime.files import cache_folder
from runtime.oci.access import MOUNTED, credential_files

WEIGHTS = ("/workspace/weights", "/workspace/tfs/weights", "/workspace/vllm/weights")
"""Model weights, baked into the image (before v0.5) or pulled by an init container."""

PRESET_FILE = "preset.txt"
"""File beside baked weights with the name of their preset."""


def in_pod(environ: Mapping[str, str]) -> bool:
    """Return whether a process with this environment runs in a pod."""
    return "KUBERNETES_SERVICE_HOST" in environ


@dataclass(frozen=True, slots=True)
class Mounts:
    """Fixed paths, below `root`."""

    root: Path
    environ: Mapping[str, str]

    def at(self, path: str | Path) -> Path:
        """Return the absolute `path` below the root."""
        return self.root / str(path).lstrip("/")

    @property
    def training_config(self) -> Path:
        return self.at("/mnt/config/training_config.yaml")

    @property
    def inference_config(self) -> Path:
        return self.at("/mnt/config/inference_config.yaml")

    @property
    def data(self) -> Path:
        return self.at("/mnt/data")

    @property
    def controlled(self) -> bool:
        """Whether this is a controller's layout: its configuration is mounted, or this is a pod."""
        return self.training_config.is_file() or in_pod(self.environ)

    def weights(self) -> Path | None:
        """Return the mounted directory with model weights, None when there is none."""
        folders = (self.at(path) for path in WEIGHTS)
        return next((folder for folder in folders if (folder / "config.json").is_file()), None)

    def preset(self) -> str | None:
        """Return the preset whose weights are baked into the image (docker/preset.Dockerfile), if any."""
        weights = self.weights()
        note = weights / PRESET_FILE if weights else None
        return note.read_text(encoding="utf-8").strip() if note and note.is_file() else None

    def adapters(self) -> list[Path]:
        """Return the mounted adapter directories, sorted by name."""
        return adapters.find(self.at("/mnt/adapter"))

    def credentials(self) -> tuple[Path, str] | None:
        """Return the registry credentials to use and who wrote them, None when there are none."""
        for file in credential_files(self.environ):
            path = self.at(file.path) if file.path in MOUNTED else file.path
            if _is_there(path):
                return path, file.origin
        return None

    def cache(self) -> Path:
        """Return the directory for files that can be fetched again."""
        return cache_folder(self.environ)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # /root, for another user
        return False
