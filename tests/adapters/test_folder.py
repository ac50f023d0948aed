"""Adapter folders: whole or refused by name, and what serving would get wrong is refused too."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from runtime import adapters, oci
from runtime.errors import ConfigError
from runtime.oci.access import DEFAULT
from tests.adapters.made import make


def test_a_saved_adapter_passes_its_own_check_and_loads_in_plain_peft(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = make(tiny_llama_dir, tmp_path / "a")
    found = adapters.check_served(folder, base="someone/tiny")
    assert (found.rank, found.fields.lora_alpha, len(found.paths)) == (4, 8.0, 4)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir)), str(folder))


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
    (lambda folder: _edit(folder, task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
    (lambda folder: _edit(folder, peft_type="IA3"), "peft_type is 'IA3'"),
    (lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000), "too deep"),
    (lambda folder: (folder / "adapter_config.json").write_text(" " * (5 << 20)), "larger than 4 MiB"),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGE)
def test_fault_49_an_adapter_that_must_not_load_is_refused_by_name(
    damage: Callable[[Path], None], expected: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = make(tiny_llama_dir, tmp_path / "support")
    damage(folder)
    with pytest.raises(ConfigError, match=f"adapter support: .*{expected}"):
        adapters.check(folder, base="someone/tiny")


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
        adapters.check(folder, base="someone/tiny")
    assert "\n" not in str(caught.value)


def test_a_base_path_as_kaito_writes_it_passes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make(tiny_llama_dir, tmp_path / "a")
    _edit(folder, base_model_name_or_path="/workspace/tfs/weights")
    assert adapters.check(folder, base="someone/tiny").base == "/workspace/tfs/weights"


def test_find_lists_adapters_half_written_ones_too(
    tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tiny_llama_dir, tmp_path / "b")
    make(tiny_llama_dir, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "notes").mkdir()
    assert [path.name for path in adapters.find(tmp_path)] == ["a", "b"]
    (tmp_path / "b" / "elsewhere").symlink_to(tmp_path / "a")
    assert adapters.find(tmp_path / "b") == []
    assert caplog.messages == [
        f"Adapter refused: elsewhere: {tmp_path}/b/elsewhere is a link out of {tmp_path}/b"
    ]
    assert adapters.find(tmp_path / "none") == []


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


def test_an_image_needs_a_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / adapters.CONFIG_FILE).write_text("{}")
    image = f"oci:{tmp_path}/layout:v1"
    oci.push(tmp_path, oci.parse(image), files=[adapters.CONFIG_FILE])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with (
        pytest.raises(ConfigError, match="no temporary directory can be made"),
        adapters.local_copy(image, access=DEFAULT),
    ):
        pass


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


def _rename(folder: Path, old: str, new: str) -> None:
    path = folder / adapters.WEIGHTS_FILE
    save_file({key.replace(old, new): value for key, value in load_file(str(path)).items()}, str(path))


def _resize(folder: Path, shape: tuple[int, ...]) -> None:
    path = folder / adapters.WEIGHTS_FILE
    weights = load_file(str(path))
    save_file(weights | {next(iter(weights)): torch.zeros(shape)}, str(path))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
        ({"target_parameters": ["mlp.gate_proj.weight"]}, "target_parameters"),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'. 2 LoRA")
def test_keys_that_serving_does_not_carry_out_are_refused_by_name(
    tiny_llama_dir: Path, tmp_path: Path, options: dict[str, Any], key: str
) -> None:
    folder = tmp_path / "a"
    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    config = LoraConfig(**({"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options))
    get_peft_model(base, config).save_pretrained(str(folder), save_embedding_layers=False)
    with pytest.raises(ConfigError, match=rf"adapter support: cannot be served as an adapter: .*\b{key}: "):
        adapters.check_served(folder, name="support")
    assert adapters.check(folder).paths is not None


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_an_adapter_of_changed_base_weights_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, init: str
) -> None:
    folder = make(tiny_llama_dir, tmp_path / "a")
    _edit(folder, init_lora_weights=init)
    with pytest.raises(ConfigError, match=f"init_lora_weights is '{init}': it took a part out of the base"):
        adapters.check_served(folder)


LEFT_OVER: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: _rename(folder, "lora_A.weight", "lora_magnitude_vector"), "holds no LoRA weights"),
    (lambda folder: _rename(folder, "v_proj.lora_B.weight", "v_proj.lora_B.bias"), r"expected pairs"),
    (lambda folder: _rename(folder, "v_proj.lora_", "v_proj.lora_embedding_"), "lora_embedding_A.*expected"),
    (lambda folder: _rename(folder, "1.self_attn.v_proj.lora_A", "1.input_layernorm"), "expected pairs"),
    (lambda folder: _rename(folder, "v_proj", "o_proj"), "self_attn.o_proj, which its adapter_config.json"),
    (lambda folder: _edit(folder, exclude_modules=["v_proj"]), "v_proj, which its adapter_config.json"),
    (lambda folder: _edit(folder, layers_to_transform=[0]), "layers.1.self_attn"),
    (lambda folder: _edit(folder, target_modules="(a+)+$"), "which its adapter_config.json leaves out"),
    (lambda folder: _edit(folder, target_modules="(q_proj"), "target_modules: .* is no regular expression"),
    (lambda folder: _resize(folder, (4, 64, 1)), "expected a matrix"),
    (lambda folder: _resize(folder, (8, 64)), "of rank 8 and lora_B of 4"),
]


@pytest.mark.parametrize(("change", "expected"), LEFT_OVER)
def test_weights_that_would_not_be_used_are_refused_by_name(
    change: Callable[[Path], None], expected: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = make(tiny_llama_dir, tmp_path / "a")
    change(folder)
    with pytest.raises(ConfigError, match=f"adapter support: .*{expected}"):
        adapters.check_served(folder, name="support")


def test_a_rank_above_the_limit_is_refused_with_both_numbers(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make(tiny_llama_dir, tmp_path / "a")
    rank = adapters.check_served(folder).rank
    assert adapters.check_served(folder, most_rank=rank).rank == rank
    with pytest.raises(ConfigError, match=f"adapter a: has rank {rank}, and max_lora_rank is {rank - 1}"):
        adapters.check_served(folder, most_rank=rank - 1)


def test_an_unknown_key_that_asks_for_something_is_refused_and_another_one_named(
    tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(tiny_llama_dir, tmp_path / "a")
    _edit(folder, next_config=None, next_way=False)
    caplog.set_level("INFO")
    adapters.check_served(folder)
    assert "adapter a: keys that are not known here and ask for nothing: next_config, next_way" in caplog.text
    _edit(folder, use_next_year=True)
    with pytest.raises(ConfigError, match="not known here and may change what it computes: use_next_year;"):
        adapters.check_served(folder)


@pytest.mark.parametrize(
    ("size", "header", "reason"),
    [
        (17 << 30, 100, "has 18,253,611,008 bytes; an adapter has 17,179,869,184 at most"),
        (80 << 20, 40 << 20, "has a header of 41,943,040 bytes; an adapter has 33,554,432 at most"),
        (200, 40 << 20, "is damaged or half-written"),
    ],
)
def test_weights_larger_than_any_adapters_are_refused_unread(
    size: int, header: int, reason: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    weights = make(tiny_llama_dir, tmp_path / "a") / "adapter_model.safetensors"
    with weights.open("wb") as file:  # sparse: takes no room
        file.write(header.to_bytes(8, "little"))
        file.truncate(size)
    with pytest.raises(ConfigError, match=f"adapter a: .* {reason}"):
        adapters.check(weights.parent)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused(file: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Its author would have the server read any file of its machine, and a template shows what it reads."""
    folder = make(tiny_llama_dir, tmp_path / "support")
    outside = tmp_path / "outside"
    (folder / file).rename(outside) if (folder / file).exists() else outside.write_text("secret")
    (folder / file).symlink_to("../outside")
    with pytest.raises(ConfigError, match=rf"^adapter support: .*{file} is a link out of "):
        adapters.check_served(folder)


def test_links_of_volumes_and_of_the_hubs_cache_are_followed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    made = make(tiny_llama_dir, tmp_path / "made")
    volume, snapshot = tmp_path / "volume", tmp_path / "models--a--b" / "snapshots" / "0123"
    for folder, store in ((volume, volume / "..2026"), (snapshot, tmp_path / "models--a--b" / "blobs")):
        folder.mkdir(parents=True)
        store.mkdir()
        for file in made.iterdir():
            (store / file.name).write_bytes(file.read_bytes())
            (folder / file.name).symlink_to(store / file.name)
        assert adapters.check_served(folder).rank == 4


@pytest.mark.parametrize("replace", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_refused_and_not_waited_for(
    replace: Callable[[Path], None], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = make(tiny_llama_dir, tmp_path / "support")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).rename(tmp_path / file)
        replace(folder / file)
        with pytest.raises(ConfigError, match=rf"^adapter support: .*{file} is no file$"):
            adapters.check_served(folder)
        folder.joinpath(file).rmdir() if (folder / file).is_dir() else (folder / file).unlink()
        (tmp_path / file).rename(folder / file)


@pytest.mark.parametrize("changes", [{"r": 8}, {"rank_pattern": {"q_proj": 2}}])
def test_weights_of_another_rank_than_stated_are_refused(
    changes: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """peft does not load them, and the scaling would be that of another adapter."""
    folder = make(tiny_llama_dir, tmp_path / "support")
    _edit(folder, **changes)
    rank = changes.get("r", 2)
    with pytest.raises(ConfigError, match=rf"^adapter support: .*q_proj has rank 4, its .* {rank} \("):
        adapters.check_served(folder)
