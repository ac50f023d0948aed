"""Saved adapters: the public model's name in them, the same bytes for the same run, all files or none."""

import json
import os
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from runtime import adapters
from tests.adapters.made import SOURCE, make


def test_the_config_names_the_public_model_and_no_path_of_this_machine(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = make(tiny_llama_dir, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"
    assert config["revision"] == "0" * 40
    assert str(tiny_llama_dir) not in json.dumps(config)


def test_saving_twice_gives_the_same_bytes_and_leaves_nothing_else(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    first, second = make(tiny_llama_dir, tmp_path / "a"), make(tiny_llama_dir, tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_every_user_may_read_the_weights_who_may_read_the_config(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """safetensors writes files of mode 0600; a server runs under another user id than the tuning did."""
    folder = make(tiny_llama_dir, tmp_path / "a")
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(set(modes.values())) == 1, modes
    umask = os.umask(0o022)
    os.umask(umask)
    assert modes["adapter_model.safetensors"] == 0o666 & ~umask


def test_a_failure_while_saving_leaves_no_adapter(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def fail(scratch: Path) -> None:
        raise OSError("disk full")

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir)), LoraConfig(target_modules=["q_proj"])
    )
    with pytest.raises(OSError, match="disk full"):
        adapters.save(model, tmp_path / "a", source=SOURCE, beside=fail)
    assert list((tmp_path / "a").iterdir()) == []
