"""Base models: where they are found, how they are refused, and that the demo model is the real one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from runtime import adapters, models
from runtime.errors import ConfigError, RegistryError, TransientError
from runtime.hardware import Hardware
from runtime.model_source import ModelSource, Quantization

CPU = Hardware("cpu", "CPU", None, 8 << 30, 1)


def test_a_local_directory_loads_without_the_hub(tiny_llama_dir: Path) -> None:
    source = ModelSource(name=str(tiny_llama_dir))
    model = models.load(source, hardware=CPU, device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert models.load_tokenizer(source).chat_template


def test_nf4_weights_are_quantised_twice_on_a_cpu(tiny_llama_dir: Path) -> None:
    import bitsandbytes

    model = models.load(
        ModelSource(name=str(tiny_llama_dir)), hardware=CPU, device="cpu", quantization=Quantization()
    )
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.float32


def test_pickled_weights_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"only pickled weights \(pytorch_model.bin\)"):
        models.locate(ModelSource(name=str(tmp_path)))


@pytest.mark.parametrize("name", ["/no/such/model", "."])
def test_a_directory_that_is_no_model_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"model directory {name}"):
        models.locate(ModelSource(name=name))


def test_an_unreachable_hub_is_worth_a_retry() -> None:
    with pytest.raises(TransientError, match="cannot be reached for nobody/nothing"):
        models.locate(ModelSource(name="x", repository="nobody/nothing"))


def test_local_files_only_never_asks_the_hub() -> None:
    with pytest.raises(ConfigError, match="local_files_only is set"):
        models.locate(ModelSource(name="x", repository="nobody/nothing", local_files_only=True))


def test_a_padding_token_is_set_where_the_model_has_none(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_llama_dir))
    tokenizer.pad_token = None
    for file in tiny_llama_dir.iterdir():
        shutil.copy(file, tmp_path)
    tokenizer.save_pretrained(str(tmp_path))
    loaded = models.load_tokenizer(ModelSource(name=str(tmp_path), chat_template="{{ 'x' }}"))
    assert loaded.pad_token == loaded.eos_token
    assert loaded.chat_template == "{{ 'x' }}"


def test_named_chat_templates_are_saved_in_a_file_that_every_image_holds(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    tokenizer: Any = models.load_tokenizer(ModelSource(name="tiny", path=tiny_llama_dir))
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    models.save_tokenizer(tokenizer, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() or path.suffix == ".jinja"]
    assert adapters.own_template(tmp_path, "it") == {"default": "a", "tool_use": "b"}


def test_a_saved_tokenizer_holds_nothing_of_its_last_call(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Servers that read tokenizer.json without transformers would cut and pad every prompt."""
    from tokenizers import Tokenizer

    tokenizer = models.load_tokenizer(ModelSource(name="tiny", path=tiny_llama_dir))
    tokenizer(["a", "longer text"], padding=True, padding_side="left", truncation=True, max_length=8)
    models.save_tokenizer(tokenizer, tmp_path)
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (saved.truncation, saved.padding) == (None, None)
    before = json.loads((tiny_llama_dir / "tokenizer_config.json").read_text())
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == before


@pytest.mark.model
def test_the_packaged_demo_model_has_its_shared_matrix_where_every_reader_looks(demo_model_dir: Path) -> None:
    with safe_open(str(demo_model_dir / "model.safetensors"), framework="np") as weights:
        names = set(weights.keys())
    assert "model.embed_tokens.weight" in names  # vLLM skips lm_head of a model that ties the two
    assert "lm_head.weight" not in names


@pytest.mark.model
def test_the_packaged_demo_model_knows_the_capital_of_france(demo_model_dir: Path) -> None:
    source = ModelSource(name="demo", path=demo_model_dir)
    tokenizer = models.load_tokenizer(source)
    model = models.load(source, hardware=CPU, device="cpu")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0][prompt["input_ids"].shape[1] :])


def test_weights_come_from_an_image_once(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime import oci, presets

    monkeypatch.setenv("RUNTIME_CACHE", str(tmp_path / "cache"))
    image = f"oci:{tmp_path}/layout:v1"
    oci.push(tiny_llama_dir, oci.parse(image))
    source = presets.source(image)
    folder = models.locate(source)
    assert (folder / "model.safetensors").read_bytes() == (tiny_llama_dir / "model.safetensors").read_bytes()
    before = (folder / "model.safetensors").stat().st_ino
    assert models.locate(source) == folder
    assert (folder / "model.safetensors").stat().st_ino == before


def test_weights_of_an_image_in_a_signed_index_are_taken(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cosign sign` of an image for several machines signs the index alone."""
    from runtime import oci, presets
    from tests.oci.conftest import indexed
    from tests.oci.keypairs import make_pair

    monkeypatch.setenv("RUNTIME_CACHE", str(tmp_path / "cache"))
    pair, reference = make_pair(tmp_path), oci.parse(f"oci:{tmp_path}/layout:v1")
    index = indexed(reference, oci.push(tiny_llama_dir, reference))
    keys = {"required_keys": (str(pair.public),)}
    source = presets.source(str(reference)).model_copy(update=keys)
    with pytest.raises(RegistryError, match="is not signed"):
        models.locate(source)
    oci.sign(reference, index, oci.read_private(pair.private))
    assert (models.locate(source) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("oci:./weights", "oci:./weights"),
        ("docker://my.azurecr.io/kaito/phi-3:1", "my.azurecr.io/kaito/phi-3:1"),
        ("my.azurecr.io/kaito/phi-3:1", "my.azurecr.io/kaito/phi-3:1"),
        ("localhost:5000/phi-3:1", "localhost:5000/phi-3:1"),
        ("HuggingFaceTB/SmolLM2-1.7B", None),
        ("some.org/model-1.5", None),
    ],
)
def test_image_and_repository_id_are_told_apart(name: str, image: str | None) -> None:
    from runtime import presets

    assert presets.source(name).image == image
