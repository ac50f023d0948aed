"""Manifests and configuration files of KAITO, and what is made of them, for the tests of this folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from runtime.tuning.settings import TuningJob
from runtime.workspace import Resolved, load_job

ROOT = Path(__file__).parents[2]


SEED = ROOT / "examples/fine-tuning/kaito_workspace_tuning_phi_3.yaml"


QLORA = ROOT / "examples/fine-tuning/qlora-params-template.yaml"


LORA = ROOT / "examples/fine-tuning/lora-params-template.yaml"


SERVE = ROOT / "examples/inference/kaito_workspace_phi_3_with_adapter.yaml"


STOCK = """\
training_config:
  ModelConfig:
    torch_dtype: "bfloat16"
    local_files_only: true
    device_map: "auto"
  QuantizationConfig:
    load_in_4bit: true
    bnb_4bit_quant_type: "nf4"
    bnb_4bit_compute_dtype: "bfloat16"
    bnb_4bit_use_double_quant: true
  LoraConfig:
    r: 8
    lora_alpha: 8
    lora_dropout: 0.0
  TrainingArguments:
    output_dir: "/mnt/results"
    ddp_find_unused_parameters: false
    save_strategy: "no"
    per_device_train_batch_size: 1
  DataCollator:
    mlm: true
  DatasetConfig:
    shuffle_dataset: true
    train_test_split: 1
"""


def manifest(**changes: Any) -> dict[str, Any]:
    """Return the seed's manifest with dotted paths replaced (None removes)."""
    document: dict[str, Any] = yaml.safe_load(SEED.read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        table = document
        for parent in parents:
            table = table.setdefault(parent, {})
        if value is None:
            del table[last]
        else:
            table[last] = value
    return document


def write(folder: Path, *documents: Mapping[str, Any]) -> Path:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return file


def load(target: Path | str | None, root: Path, **given: Any) -> Resolved[TuningJob]:
    """Resolve with an empty environment and an empty machine, unless others are given."""
    return load_job(target, **{"environ": {}, "root": root, **given})


def config_map(text: str, name: str = "mine") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"training_config.yaml": text},
    }
