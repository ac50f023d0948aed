"""Adapter folders: whole or refused by name, loadable in plain peft, the same bytes for the same run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runtime import adapters, oci
from runtime.errors import ConfigError
from runtime.model_source import ModelSource
from runtime.oci.access import DEFAULT

SOURCE = ModelSource(name="tiny", repository="someone/tiny", revision="0" * 40)


def make(tiny_llama_dir: Path, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
    )
    adapters.save(get_peft_model(model, config), folder, source=SOURCE)
    return folder


def test_a_saved_adapter_passes_its_own_check_and_loads_in_plain_peft(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = make(tiny_llama_dir, tmp_path / "a")
    found = adapters.check(folder, base="someone/tiny", max_rank=16)
    assert (found.rank, found.alpha, found.targets) == (4, 8.0, ("q_proj", "v_proj"))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir)), str(folder))


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


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is it half-written"),
    (_truncate, "damaged or half-written"),
    (_pickle, "only adapter_model.bin, and pickled weights can run code"),
    (lambda folder: _edit(folder, base_model_name_or_path="someone/else"), "trained on someone/else"),
    (lambda folder: _edit(folder, r=64), "rank is 64, the limit here is 16"),
    (lambda folder: _edit(folder, modules_to_save=["lm_head"]), "modules_to_save"),
    (lambda folder: _edit(folder, peft_type="IA3"), "peft_type is 'IA3'"),
    (lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000), "too deep"),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGE)
def test_fault_49_an_adapter_that_must_not_load_is_refused_by_name(
    damage: Callable[[Path], None], expected: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = make(tiny_llama_dir, tmp_path / "support")
    damage(folder)
    with pytest.raises(ConfigError, match=f"adapter support: .*{expected}"):
        adapters.check(folder, base="someone/tiny", max_rank=16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("r", value) for value in ("8", True, 0, -1, 8.5, None)),
        *(("rank_pattern", value) for value in ([1], "x", {"q": "8"}, {"q": 0})),
        *(("lora_alpha", value) for value in ("x", None, [1], float("inf"), float("nan"))),
        *(("alpha_pattern", value) for value in ([1], {"q": "z"})),
        *(("target_modules", value) for value in (5, [1, "a"], {"a": 1}, [None])),
        *(("base_model_name_or_path", value) for value in (5, ["a/b"], {"a": 1})),
        ("modules_to_save", {"x": 1}),
        ("use_rslora", "yes"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(
    tiny_llama_dir: Path, tmp_path: Path, field: str, value: object
) -> None:
    folder = make(tiny_llama_dir, tmp_path / "support")
    _edit(folder, **{field: value})
    with pytest.raises(ConfigError, match=f"adapter support: adapter_config.json: '{field}") as caught:
        adapters.check(folder, base="someone/tiny", max_rank=16)
    assert "\n" not in str(caught.value)


def test_a_base_path_as_kaito_writes_it_passes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make(tiny_llama_dir, tmp_path / "a")
    _edit(folder, base_model_name_or_path="/workspace/tfs/weights")
    assert adapters.check(folder, base="someone/tiny").base == "/workspace/tfs/weights"


def test_find_lists_adapters_half_written_ones_too(tiny_llama_dir: Path, tmp_path: Path) -> None:
    make(tiny_llama_dir, tmp_path / "b")
    make(tiny_llama_dir, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "notes").mkdir()
    assert [path.name for path in adapters.find(tmp_path)] == ["a", "b"]
    assert adapters.find(tmp_path / "none") == []


def _updates(folder: Path) -> dict[str, torch.Tensor]:
    """Return each layer's whole update, as plain peft computes it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(str(folder / "adapter_model.safetensors"))
    layers = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    return {
        name: scale * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"] for name in layers
    }


def test_combined_adapter_does_what_its_parts_do_together(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Different ranks, targets, scalings and strengths; exact, and plain peft loads it."""
    one = make(tiny_llama_dir, tmp_path / "one", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    other = get_peft_model(
        model,
        LoraConfig(
            r=2, lora_alpha=3, use_rslora=True, target_modules=["v_proj", "up_proj"], init_lora_weights=False
        ),
    )
    adapters.save(other, tmp_path / "two", source=SOURCE)
    adapters.combine([(one, 0.5), (tmp_path / "two", 1.0)], tmp_path / "both")
    assert adapters.check(tmp_path / "both").rank == 6
    both, first, second = _updates(tmp_path / "both"), _updates(one), _updates(tmp_path / "two")
    assert both.keys() == first.keys() | second.keys()
    for name, update in both.items():
        expected = 0.5 * first.get(name, torch.zeros_like(update)) + second.get(
            name, torch.zeros_like(update)
        )
        torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-6)
    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir)), str(tmp_path / "both")
    )


def test_adapters_that_do_not_add_up_are_not_combined(tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole = make(tiny_llama_dir, tmp_path / "whole")
    dora = make(tiny_llama_dir, tmp_path / "dora", use_dora=True)
    with pytest.raises(
        ConfigError, match=r"adapter dora: .*lora_magnitude_vector.* is no part of a LoRA pair"
    ):
        adapters.combine([(whole, 1.0), (dora, 1.0)], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_an_adapter_is_read_where_it_is_or_pulled_for_as_long_as_it_is_needed(tmp_path: Path) -> None:
    folder = tmp_path / "pushed" / "deep" / "adapter"
    folder.mkdir(parents=True)
    (folder / adapters.CONFIG_FILE).write_text("{}")
    image = f"oci:{tmp_path}/layout:v1"
    oci.push(tmp_path / "pushed", oci.parse(image))
    with adapters.local_copy(str(folder), access=DEFAULT) as found:
        assert found == folder
    with adapters.local_copy(image, access=DEFAULT) as found:
        assert [path.name for path in found.iterdir()] == [adapters.CONFIG_FILE]
    assert not found.exists()


def test_a_reference_without_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no adapter")
    image = f"oci:{tmp_path}/layout:v1"
    oci.push(tmp_path, oci.parse(image), files=["notes.txt"])
    for reference, message in (
        (image, f"adapter support: {image} holds no adapter_config.json"),
        (f"{tmp_path}/missing", f"adapter support: no directory {tmp_path}/missing"),
        ("missing", "adapter support: no directory missing; an image is written registry/repository:tag"),
    ):
        with (
            pytest.raises(ConfigError, match=message),
            adapters.local_copy(reference, access=DEFAULT, name="support"),
        ):
            pass


def test_an_image_with_several_adapters_is_refused_by_their_names(tmp_path: Path) -> None:
    for name in ("a", "b", "c/deeper"):
        (tmp_path / "pushed" / name).mkdir(parents=True)
        (tmp_path / "pushed" / name / adapters.CONFIG_FILE).write_text("{}")
    image = f"oci:{tmp_path}/layout:v1"
    oci.push(tmp_path / "pushed", oci.parse(image))
    with (
        pytest.raises(ConfigError, match=r"adapter support: .* holds 2 adapters \(a, b\), expected one"),
        adapters.local_copy(image, access=DEFAULT, name="support"),
    ):
        pass
    oci.push(
        tmp_path / "pushed", oci.parse(image), files=["a/adapter_config.json", "c/deeper/adapter_config.json"]
    )
    with adapters.local_copy(image, access=DEFAULT) as found:
        assert found.name == "a"
