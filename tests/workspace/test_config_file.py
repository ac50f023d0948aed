"""Which training_config.yaml applies: of a flag, the environment, a ConfigMap beside the manifest."""

from pathlib import Path

import pytest

from runtime.errors import ConfigError
from tests.workspace.documents import STOCK, config_map, load, manifest, write


def test_config_map_in_the_file_is_chosen_by_name(tmp_path: Path) -> None:
    other = STOCK.replace("r: 8", "r: 4")
    file = write(
        tmp_path, manifest(tuning__config="mine"), config_map(other, "other"), config_map(STOCK, "mine")
    )
    resolved = load(file, tmp_path)
    assert resolved.config.lora.r == 8
    assert resolved.sources["lora.r"] == "job.yaml ConfigMap mine LoraConfig.r"


def test_config_flag_wins_over_environment_and_file(tmp_path: Path) -> None:
    named, flagged = tmp_path / "named.yaml", tmp_path / "flagged.yaml"
    named.write_text(STOCK.replace("r: 8", "r: 5"))
    flagged.write_text(STOCK.replace("r: 8", "r: 6"))
    file = write(tmp_path, manifest(), config_map(STOCK))
    environ = {"YAML_FILE_PATH": str(named)}
    assert load(file, tmp_path, environ=environ).config.lora.r == 5
    assert load(file, tmp_path, environ=environ, config=flagged).config.lora.r == 6


def test_missing_config_map_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    file = write(tmp_path, manifest(tuning__config="mine"), config_map(STOCK, "mime"))
    with pytest.raises(ConfigError, match=r"names ConfigMap 'mine'.*did you mean 'mime'.*--config"):
        load(file, tmp_path)
