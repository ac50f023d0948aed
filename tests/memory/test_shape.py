"""Shapes from presets and from config.json, held to the models that transformers builds from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.memory import shape
from runtime.model_source import ModelSource
from runtime.presets import all_presets, find, source
from tests.families import TINY, config_of


@pytest.mark.parametrize("kind", [*TINY, "falcon, one key-value head"])
def test_linear_modules_and_weights_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    from torch import device, nn
    from transformers import AutoModelForCausalLM

    config = config_of(kind)
    config.save_pretrained(str(tmp_path))
    with device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = shape.read(tmp_path / "config.json", name=kind)
    linears = {
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".0." in name
    }
    assert {(it.name, it.inputs, it.outputs) for it in found.linears} == linears
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert found.parameters == pytest.approx(weights, rel=0.03)


WHOLE = [it for it in all_presets() if it.stored_as == "bfloat16" and it.dimensions is not None]


@pytest.mark.parametrize("preset", WHOLE, ids=lambda preset: preset.name)
def test_presets_count_the_weights_of_their_files(preset: Any) -> None:
    found = shape.of(source(preset.name))
    count = found.parameters
    head = preset.dimensions.vocabulary * preset.dimensions.hidden if preset.stored_head else 0
    assert (count + head) * 2 == pytest.approx(found.stored_bytes, rel=0.02)


def test_a_preset_whose_layers_differ_is_counted_with_what_is_loaded_beside_them() -> None:
    preset = find("gemma-4-12b-instruct")
    found = shape.of(source(preset.name))
    assert found.parameters == pytest.approx(preset.parameters, rel=0.001)
    assert preset.parameters == (preset.counted_parameters or 0) + preset.other_parameters
    assert found.cache.window == 1024
    assert found.context_tokens == 262_144


def test_targets_reach_what_peft_would_adapt() -> None:
    phi = shape.of(source("phi-3-mini-4k-instruct"))
    assert [it.name for it in phi.adapted("all-linear")] == [
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj",
    ]  # fmt: skip
    assert [it.name for it in phi.adapted(("qkv_proj", "o_proj"))] == ["qkv_proj", "o_proj"]
    assert [it.name for it in phi.adapted(r".*\.mlp\.\w+")] == ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize("kinds_stated", [True, False])
@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("mistral", {}),
        ("phi3", {"sliding_window": 16}),
        ("gemma2", {}),
        ("gemma3_text", {"num_hidden_layers": 12}),
        ("gemma3_text", {"num_hidden_layers": 12, "sliding_window_pattern": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16}),
    ],
)
def test_windows_are_those_of_the_model_whether_or_not_each_layer_is_stated(
    kind: str, changed: dict[str, Any], kinds_stated: bool, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    from runtime.serving.engine.kv_pool import LayerKinds

    stated = json.loads(config_of(kind).to_json_string()) | changed
    stated.pop("layer_types", None)
    made = AutoConfig.for_model(**stated)
    file = tmp_path / "config.json"
    file.write_text(made.to_json_string() if kinds_stated else json.dumps(stated))
    found, kinds = shape.read(file, name=kind), LayerKinds.of(made)
    windows = [kinds.kinds[index].window for index in kinds.of_layer]
    if "layer_types" in made:
        assert [kind == "full_attention" for kind in made.layer_types] == [each is None for each in windows]
    each = 2 * found.dimensions.kv_heads * found.dimensions.head_dim
    assert found.cache.token == each * windows.count(None)
    assert found.cache.window_token == each * (len(windows) - windows.count(None))


def test_a_config_without_a_shape_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"config\.json: no shape of a decoder-only model"):
        shape.read(tmp_path / "config.json", name="m")


def test_a_directory_needs_no_preset(tiny_llama_dir: Path) -> None:
    found = shape.of(ModelSource(name="tiny", path=tiny_llama_dir))
    assert (found.model_type, found.context_tokens, found.dimensions.kv_heads) == ("llama", 2048, 2)
    assert found.stored_bytes == (tiny_llama_dir / "model.safetensors").stat().st_size
    assert shape.of(source("phi-2")).dimensions.layers == 32
