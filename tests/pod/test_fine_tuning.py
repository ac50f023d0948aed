"""fine_tuning.py as controllers start it, without a container."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.pod.processes import FILES, free_port, started
from tests.tuning.conftest import write_rows

ACCELERATE = str(Path(sys.executable).with_name("accelerate"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows under the name that downloaders before v0.7 gave the file."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "rows.parquet", 24)
    (folder / "rows.parquet").rename(folder / "rows.parquet_download_true")
    return folder


@pytest.fixture
def configured(tmp_path: Path, tiny_llama_dir: Path, rows: Path) -> dict[str, str]:
    """The variables that lead fine_tuning.py to a tiny model, a few rows and an output folder."""
    config = {
        "ModelConfig": {"pretrained_model_name_or_path": str(tiny_llama_dir), "torch_dtype": "bfloat16"},
        "QuantizationConfig": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "LoraConfig": {"r": 4, "lora_alpha": 8},
        "TrainingArguments": {"output_dir": str(tmp_path / "results"), "max_steps": 2},
        "DatasetConfig": {"train_test_split": 1},
    }
    (tmp_path / "training_config.yaml").write_text(yaml.safe_dump({"training_config": config}))
    return {"YAML_FILE_PATH": str(tmp_path / "training_config.yaml"), "DATASET_FOLDER_PATH": str(rows)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_fine_tuning_writes_adapter_and_sentinel(
    processes: int, configured: dict[str, str], tmp_path: Path
) -> None:
    """With flags that KAITO v0.6 to v0.9 pass by mistake."""
    stray = ["--torch_dtype=auto", "--pipeline=text-generation", "--trust_remote_code"]
    command = [
        ACCELERATE,
        "launch",
        f"--num_processes={processes}",
        str(FILES / "tfs/fine_tuning.py"),
        *stray,
    ]
    log = tmp_path / "log"
    port = {"MASTER_PORT": str(free_port())}
    with started(command, log, **configured, **port) as process:
        assert process.wait(180) == 0, log.read_text()
    found = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "fine_tuning_completed.txt"} <= found
    assert (
        (tmp_path / "results/fine_tuning_completed.txt").read_text().startswith("Fine-Tuning completed at ")
    )
    assert "ignored flags: " in log.read_text()


def test_fine_tuning_without_data_logs_the_folder_and_writes_no_sentinel(
    configured: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    log = tmp_path / "log"
    command = [sys.executable, str(FILES / "tfs/fine_tuning.py")]
    with started(command, log, **configured | {"DATASET_FOLDER_PATH": str(tmp_path / "empty")}) as process:
        assert process.wait(90) == 3, log.read_text()
    assert not (tmp_path / "results/fine_tuning_completed.txt").exists()
    last = [json.loads(line) for line in log.read_text().splitlines() if '"error"' in line][-1]
    assert str(tmp_path / "empty") in last["msg"]
