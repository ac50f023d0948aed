"""A directory laid out like the file system of a controller's tuning pod."""

import json
from pathlib import Path

import pytest

from tests.workspace.documents import STOCK


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    """A root directory laid out as a controller does for a tuning pod."""
    (tmp_path / "mnt/config").mkdir(parents=True)
    (tmp_path / "mnt/config/training_config.yaml").write_text(STOCK)
    (tmp_path / "mnt/data").mkdir()
    weights = tmp_path / "workspace/weights"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    (weights / "model.safetensors").touch()
    return tmp_path
