"""An adapter-like folder, and registries started for the tests."""

import json
import random
from pathlib import Path

import pytest


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder as tuning leaves it: configuration, weights that do not compress, a subfolder."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(random.Random(7).randbytes(3_000_000))
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {f"w{n}": n for n in range(2000)}}})
    )
    (folder / "report").mkdir()
    (folder / "report/answers.md").write_text("# answers\n" * 50)
    return folder
