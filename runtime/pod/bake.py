"""Puts a preset's weights into an image (docker/preset.Dockerfile), where its licence allows redistribution.

The weights, the licence's text and the preset's name go to the path where controllers mount weights, so
that the image serves and tunes without flags or a network. Start at `bake`.
"""

import shutil
from pathlib import Path

from runtime import models, presets
from runtime.errors import ConfigError
from runtime.presets import Preset
from runtime.workspace.mounts import PRESET_FILE

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def bake(name: str, folder: Path, *, weights: Path | None = None) -> None:
    """Fill `folder` with the weights of preset `name`: those in `weights`, or the hub's at its revision.

    Raises ConfigError where the licence forbids an image that others can pull.
    """
    preset = presets.find(name)
    if not preset.redistributable:
        raise ConfigError(
            f"preset {preset.name}: its licence ({preset.licence}) sets conditions on passing weights on, "
            "so no image is made; let the server download them with your HF_TOKEN, or mount them"
        )
    source = preset.source()
    located = models.locate(source.model_copy(update={"path": weights}) if weights else source)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(located.iterdir()):
        if path.is_file():  # the hub's cache holds links to its blobs
            shutil.copyfile(path, folder / path.name)
    if weights is None:
        _fetch_licence(preset, folder)
    (folder / PRESET_FILE).write_text(preset.name + "\n", encoding="utf-8")


def _fetch_licence(preset: Preset, folder: Path) -> None:
    """Add the texts that the licence requires beside the weights."""
    from huggingface_hub import snapshot_download

    fetched = snapshot_download(
        preset.repository, revision=preset.revision, allow_patterns=list(LICENCE_FILES)
    )
    for pattern in LICENCE_FILES:
        for path in Path(fetched).glob(pattern):
            shutil.copyfile(path, folder / path.name)
