"""Weight files that are damaged, incomplete or of another shape end the start by name."""

import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import models
from runtime.errors import ConfigError
from runtime.hardware import Hardware
from runtime.model_source import ModelSource, Quantization

CPU = Hardware("cpu", "CPU", None, 8 << 30, 1)
LAYER = "model.layers.1.mlp.down_proj.weight"
QUANTISED = [None, Quantization(), Quantization(bits=8)]

Header = dict[str, Any]


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def rewrite(model: Path, change: Callable[[Header, bytes], bytes | None]) -> None:
    """Write the weights of `model` again after `change` of their header; it may return other bytes."""
    path = model / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, values = json.loads(content[8 : 8 + size]), content[8 + size :]
    values = change(header, values) or values
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def load(model: Path, quantization: Quantization | None = None) -> Any:
    """Load `model` on the CPU."""
    source = ModelSource(name="tiny", path=model)
    return models.load(source, hardware=CPU, device="cpu", quantization=quantization)


@pytest.mark.parametrize("quantization", QUANTISED)
def test_a_missing_weight_is_refused_by_name(model: Path, quantization: Quantization | None) -> None:
    """It was filled with random numbers, and served."""
    rewrite(model, lambda header, _: header.update(other=header.pop(LAYER)))
    with pytest.raises(ConfigError, match=rf"^model tiny in .*no {LAYER}; expected .*they have other"):
        load(model, quantization)


@pytest.mark.parametrize("quantization", QUANTISED)
def test_a_weight_of_another_shape_is_refused_by_name(model: Path, quantization: Quantization | None) -> None:
    rewrite(model, lambda header, _: header[LAYER]["shape"].reverse())
    with pytest.raises(ConfigError, match=rf"{LAYER} has the shape \(128, 64\) .* makes it \(64, 128\)$"):
        load(model, quantization)


def test_many_missing_weights_are_counted(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ConfigError, match=r"layernorm.weight, model\.layers\.2\.mlp.* and 6 more; expected"):
        load(model)


def test_a_tensor_that_is_not_read_is_named_in_a_line(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    def add(header: Header, values: bytes) -> bytes:
        for name in ("head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"):
            header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(values), len(values) + 4]}
            values += bytes(4)
        return values

    rewrite(model, add)
    load(model)
    own = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    # rotary frequencies are what the architecture itself lets files hold
    assert own == [
        f"model tiny in {model}: 1 tensor of its files not read: LlamaForCausalLM has no head.weight"
    ]


@pytest.mark.parametrize("end", [4, 200, -100])
def test_a_cut_file_is_named(model: Path, end: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ConfigError, match=r"^/.*model\.safetensors is damaged or half-written: "):
        load(model)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "model-2.safetensors"}}', r"model-2\.safetensors, which .* names, is missing"),
        (
            '{"weight_map": {"a": "../m.safetensors"}}',
            r"names '\.\./m\.safetensors', which is no file beside",
        ),
        ('{"weight_map": {"a": 5}}', r"names 5, which is no file beside"),
        ('{"weight_map": {"a": ""}}', r": , which .* names, is missing"),
        ('{"weight_map": {"a": []}}', r"index\.json is no index of weights"),
        ('{"weight_map": 5}', r"index\.json is no index of weights"),
        ("[" * 100_000, r"index\.json: not valid JSON: nested too deeply"),
    ],
)
def test_an_index_that_names_no_file_of_the_folder_is_refused(model: Path, index: str, message: str) -> None:
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=message):
        load(model)


def test_pickles_that_an_index_names_are_refused_unread(model: Path) -> None:
    """transformers would unpickle them by their names, safetensors wanted or not."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "shard.bin")
    (model / "model.safetensors").rename(model / "other.safetensors")
    index = {"metadata": {}, "weight_map": {LAYER: "shard.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"names shard.bin; weights are read from \*.safetensors alone"):
        load(model)
