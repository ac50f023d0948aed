"""A job's output folder, as far as its provenance is read, and key pairs."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.oci.conftest import Started, open_registry, registry_program, start
from tests.oci.keypairs import KeyPair, make_pair

__all__ = ["Started", "open_registry", "registry_program", "start"]

REPORT: dict[str, Any] = {
    "job": "support",
    "model": {
        "name": "phi-4", "repository": "microsoft/phi-4", "revision": "main",
        "commit": "a" * 40, "weights_sha256": "b" * 64,
    },
    "data": {
        "files": [
            {"name": "tickets.parquet?sig=s3cr3tS3cr3t", "rows": 9, "sha256": "c" * 64},
            {"name": "more.jsonl", "rows": 9, "sha256": "d" * 64},
        ]
    },
    "settings": {
        "method": "qlora",
        "lora": {"r": 16, "dropout": 0.0},
        "data": {
            "urls": ["https://me:pa55word@host.test/t.parquet?sig=s3cr3tS3cr3t"],
            "token": "hf_abcdefghIJKL12",
        },
        "training": {"learning_rate": 2e-4, "api_key": "s3cr3tS3cr3t", "hub_token": "s3cr3tS3cr3t"},
    },
    "result": {"held_out_loss": {"before": 2.5, "after": 1.25}, "train_loss": 1.5, "steps": 40, "epochs": 3.0,
               "samples": [{"question": "Who is s3cr3tS3cr3t?"}]},
    "verdict": {"kind": "learnt", "text": "…"},
    "machine": {"kind": "cpu", "processes": 1},
    "versions": {"workspace-runtime": "0.1.9", "python": "3.11.7"},
    "packages": {"torch": "2.13.0+cpu", "Jinja2": "3.1.6"},
}  # fmt: skip


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    folder = tmp_path / "tuned"
    (folder / ".work").mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "microsoft/phi-4"}')
    (folder / "adapter_model.safetensors").write_bytes(random.Random(1).randbytes(20_000))
    (folder / "tuning_report.json").write_text(json.dumps(REPORT))
    return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_pair(tmp_path_factory.mktemp("keys"))
