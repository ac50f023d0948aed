"""Odd values in the JSON files of a model: one line that names file, key, value and expectation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import model_files, models
from runtime.errors import CapacityError, ConfigError
from runtime.hardware import Hardware
from runtime.memory import shape
from runtime.model_source import ModelSource

CPU = Hardware("cpu", "CPU", None, 8 << 30, 1)

ODD: list[tuple[str, str, Any, str]] = [
    (model_files.CONFIG, "hidden_size", "x", "expected a whole number from 1 to"),
    (model_files.CONFIG, "hidden_size", [], "expected a whole number"),
    (model_files.CONFIG, "hidden_size", -1, "expected a whole number"),
    (model_files.CONFIG, "hidden_size", 0, "expected a whole number"),
    (model_files.CONFIG, "hidden_size", 64.0, "expected a whole number"),
    (model_files.CONFIG, "hidden_size", True, "expected a whole number"),
    (model_files.CONFIG, "hidden_size", float("inf"), "'hidden_size' is inf"),
    (model_files.CONFIG, "hidden_size", float("nan"), "'hidden_size' is nan"),
    (model_files.CONFIG, "hidden_size", 10**30, "expected a whole number"),
    (model_files.CONFIG, "num_hidden_layers", "2", "'num_hidden_layers' is '2'"),
    (model_files.CONFIG, "num_hidden_layers", 10**9, "from 1 to 10000"),
    (model_files.CONFIG, "vocab_size", {}, "'vocab_size' is a mapping"),
    (model_files.CONFIG, "num_attention_heads", 0, "expected a whole number"),
    (model_files.CONFIG, "num_key_value_heads", 0, "expected a whole number"),
    (model_files.CONFIG, "max_position_embeddings", "9", "expected a whole number"),
    (model_files.CONFIG, "rope_scaling", 5, "expected an object"),
    (model_files.CONFIG, "rope_parameters", [], "expected an object"),
    (model_files.CONFIG, "rope_parameters", {"rope_theta": -1.0}, "'rope_parameters.rope_theta' is -1.0"),
    (model_files.CONFIG, "rms_norm_eps", float("nan"), "expected a number above 0"),
    (model_files.CONFIG, "dtype", 5, "expected a type of numbers"),
    (model_files.CONFIG, "torch_dtype", "e/vil", "expected a type of numbers"),
    (model_files.CONFIG, "architectures", 5, "expected a list of names"),
    (model_files.CONFIG, "architectures", [5], "expected a list of names"),
    (model_files.CONFIG, "model_type", 5, "expected a name of letters"),
    (model_files.CONFIG, "model_type", "../../x", "expected a name of letters"),
    (model_files.CONFIG, "quantization_config", 5, "expected an object"),
    (
        model_files.CONFIG,
        "quantization_config",
        {"quant_method": 5},
        "'quantization_config.quant_method' is 5",
    ),
    (model_files.CONFIG, "text_config", 5, "expected an object"),
    (model_files.CONFIG, "text_config", {"hidden_size": "x"}, "'text_config.hidden_size' is 'x'"),
    (model_files.CONFIG, "eos_token_id", "2", "expected an id of a token"),
    (model_files.CONFIG, "auto_map", [], "expected an object"),
    (model_files.GENERATION, "temperature", "hot", "expected a number from 0 to 100"),
    (model_files.GENERATION, "temperature", float("nan"), "'temperature' is nan"),
    (model_files.GENERATION, "top_p", 2, "expected a number from 0 to 1"),
    (model_files.GENERATION, "top_k", 0.5, "expected a whole number"),
    (model_files.GENERATION, "repetition_penalty", 0, "expected a number above 0"),
    (model_files.GENERATION, "eos_token_id", {}, "expected an id of a token"),
    (model_files.GENERATION, "do_sample", "yes", "expected true or false"),
    (model_files.TOKENIZER_CONFIG, "model_max_length", "512", "expected a number from 1"),
    (model_files.TOKENIZER_CONFIG, "chat_template", 5, "expected a template"),
    (model_files.TOKENIZER_CONFIG, "chat_template", [{"name": "default"}], "expected a template"),
    (model_files.TOKENIZER_CONFIG, "eos_token", 5, "expected text"),
    (model_files.TOKENIZER_CONFIG, "added_tokens_decoder", {"x": {}}, "expected an object of objects"),
    (model_files.TOKENIZER_CONFIG, "tokenizer_class", ["x"], "expected text"),
    (model_files.TOKENIZER_CONFIG, "padding_side", "up", "expected left or right"),
    (model_files.SPECIAL_TOKENS, "eos_token", [], "expected text"),
]
CONTENTS: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[1]", "holds a list, expected an object"),
    (b"5", "holds 5, expected an object"),
    (b"\xef\xbb\xbf{}", "not valid JSON: Unexpected UTF-8 BOM"),
    (b'{"a": "\xff"}', "not UTF-8 text (byte 7)"),
    (b'{"a": 1, "a": 2}', "the key 'a' is written twice"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "a number of more than 4,300 digits"),
]
CHECKED = (
    model_files.CONFIG,
    model_files.GENERATION,
    model_files.TOKENIZER_CONFIG,
    model_files.SPECIAL_TOKENS,
)


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def change(path: Path, key: str, value: Any) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, key: value}))


@pytest.mark.parametrize(("name", "key", "value", "message"), ODD)
def test_an_odd_value_is_named_with_what_was_expected(
    model: Path, name: str, key: str, value: Any, message: str
) -> None:
    change(model / name, key, value)
    with pytest.raises(ConfigError) as refused:
        model_files.check(model)
    said = str(refused.value)
    assert said.startswith(f"{model / name}: ")
    assert key in said
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize(("content", "message"), CONTENTS, ids=range(len(CONTENTS)))
def test_a_file_that_is_no_object_of_json_is_named(
    model: Path, name: str, content: bytes, message: str
) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(ConfigError, match="^" + str(model / name)) as refused:
        model_files.check(model)
    assert message in str(refused.value)


@pytest.mark.parametrize("name", [*CHECKED, model_files.TOKENIZER, "model.safetensors.index.json"])
def test_a_file_of_a_gigabyte_is_refused_unread(model: Path, name: str) -> None:
    with (model / name).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match=rf"{name}: has 1073741824 bytes, expected at most"):
        models.load(ModelSource(name="m", path=model), hardware=CPU, device="cpu")


def test_what_released_models_hold_is_taken(model: Path) -> None:
    """Values that look odd and are in files of the hub."""
    for name, values in (
        (
            model_files.CONFIG,
            {
                "pad_token_id": -1, "eos_token_id": [1, 2], "rope_scaling": None, "sliding_window": None,
                "torch_dtype": "torch.bfloat16", "time_step_limit": [0.0, float("inf")],
                "quantization_config": {}, "intermediate_size": [128, 128],
            },
        ),
        (model_files.GENERATION, {"top_k": None, "top_p": 1, "eos_token_id": [2], "temperature": 0}),
        (
            model_files.TOKENIZER_CONFIG,
            {
                "model_max_length": 10**30, "pad_token": None, "eos_token": {"content": "</s>"},
                "chat_template": [{"name": "default", "template": "x"}], "extra_special_tokens": [],
                "added_tokens_decoder": {"5": {"content": "x"}},
            },
        ),
    ):  # fmt: skip
        for key, value in values.items():
            change(model / name, key, value)
    model_files.check(model)


def breaks(folder: Path, change_: Callable[[Any], None]) -> None:
    """Change tokenizer.json, which its own reader checks."""
    values = json.loads((folder / "tokenizer.json").read_text())
    change_(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change_",
    [
        lambda it: it.update(model=5),
        lambda it: it.update(model=None),
        lambda it: it["model"].update(type="evil"),
        lambda it: it["model"].update(vocab=[]),
        lambda it: it["model"].update(vocab={"a": "x"}),
        lambda it: it["model"].update(vocab={"a": -1}),
        lambda it: it["model"].update(merges=[["a"]]),
        lambda it: it.update(added_tokens=5),
        lambda it: it.update(added_tokens=[{"id": "x"}]),
        lambda it: it.update(pre_tokenizer=[]),
        lambda it: it.update(decoder={"type": "evil"}),
        lambda it: it.update(normalizer="x"),
        lambda it: it.clear(),
    ],
)
def test_an_odd_tokenizer_is_one_line(model: Path, change_: Callable[[Any], None]) -> None:
    breaks(model, change_)
    with pytest.raises(ConfigError, match=r"^tokenizer of m in ") as refused:
        models.load_tokenizer(ModelSource(name="m", path=model))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 63},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"hidden_act": "evil"},
        {"hidden_act": 5},
        {"rope_parameters": {"rope_type": "evil"}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"model_type": "evil"},
        {"intermediate_size": [1, 2]},
        {"layer_types": ["evil"]},
        {"pad_token_id": 10**6},
        {"quantization_config": {"quant_method": "evil"}},
        {"quantization_config": {"quant_method": None}},
        {"text_config": {}},
        {"attention_dropout": "x"},
        {"initializer_range": []},
        {"head_dim": 7},
        {"vocab_size": 2**28},
        {"max_position_embeddings": 2**31 - 1},
    ],
)
def test_a_configuration_that_does_not_hold_together_is_a_refusal_or_serves(
    model: Path, values: dict[str, Any]
) -> None:
    """What one key alone does not tell: every reader ends well, or with a line for its user."""
    for key, value in values.items():
        change(model / "config.json", key, value)
    source = ModelSource(name="m", path=model)
    counted = [] if {"model_type", "text_config"} & set(values) else [lambda: shape.of(source)]
    for read in (
        *counted,  # by a process of its own, where they are no plain model's
        lambda: models.load(source, hardware=CPU, device="cpu"),
        lambda: models.load_tokenizer(source),
        lambda: models.stated_end_ids(source),
    ):
        try:
            read()
        except (ConfigError, CapacityError) as refused:
            assert "\n" not in str(refused)
