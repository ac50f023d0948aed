"""Workspace manifests, training_config.yaml, environment and flags: what they become, or which error."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from runtime.config import flatten
from runtime.errors import ConfigError
from runtime.tuning.settings import TuningJob
from runtime.workspace import Resolved, load_job, load_server
from runtime.workspace.flags import is_image
from runtime.workspace.layers import LayeredSettings
from runtime.workspace.mounts import Mounts
from runtime.workspace.sections import LORA_OPTIONS, LORA_OURS, LoraSection

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


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    """A root directory laid out as a controller does for a tuning pod."""
    (tmp_path / "mnt/config").mkdir(parents=True)
    (tmp_path / "mnt/config/training_config.yaml").write_text(STOCK)
    (tmp_path / "mnt/data").mkdir()
    weights = tmp_path / "workspace/weights"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    return tmp_path


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
    """Resolve with an empty environment and an empty machine, unless told otherwise."""
    return load_job(target, **{"environ": {}, "root": root, **given})


def config_map(text: str, name: str = "mine") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"training_config.yaml": text},
    }


def test_seed_manifest_becomes_its_job(tmp_path: Path) -> None:
    resolved = load(SEED, tmp_path)
    job, sources = resolved.config, resolved.sources
    assert job.model.repository == "microsoft/Phi-3-mini-128k-instruct"
    assert job.model.revision == "072cb7562cb8c4adf682a8e186aaafa49469eb5d"
    assert (job.name, job.method) == ("workspace-tuning-phi-3", "qlora")
    assert job.data.urls[0].endswith("54e3756291ca09c6.parquet?download=true")
    assert job.output.image == "ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1"
    assert sources["method"] == f"{SEED.name} tuning.method"
    assert sources["model.revision"] == "preset phi-3-mini-128k-instruct"
    assert sources["lora.r"] == "default"


def test_every_setting_has_a_source(tmp_path: Path) -> None:
    resolved = load(SEED, tmp_path, config=QLORA)
    assert (
        resolved.sources.keys()
        == flatten(resolved.config.model_dump(mode="json", exclude={"sources"})).keys()
    )
    assert all(resolved.sources.values())


def test_placeholders_stop_a_real_run_and_only_that(tmp_path: Path) -> None:
    resolved = load(SEED, tmp_path)
    words = " ".join(resolved.placeholders)
    assert all(w in words for w in ("ACR_REPO_HERE", "IMAGE_NAME_HERE", "ACR_REGISTRY_SECRET_HERE"))
    with pytest.raises(ConfigError, match=r"tuning\.output\.image still holds the placeholder"):
        resolved.ready()


def test_output_flag_replaces_the_placeholders(tmp_path: Path) -> None:
    resolved = load(SEED, tmp_path, overrides={"--output": [str(tmp_path / "out")]})
    job = resolved.ready()
    assert (job.output.folder, job.output.image) == (tmp_path / "out", None)


def test_both_api_versions_read_alike(tmp_path: Path) -> None:
    old = load(write(tmp_path, manifest()), tmp_path).config
    new = load(write(tmp_path, manifest(apiVersion="kaito.sh/v1beta1")), tmp_path).config
    assert old == new


@pytest.mark.parametrize("method", ["QLoRA", "qlora", "QLORA"])
def test_method_may_be_written_in_any_case(method: str, tmp_path: Path) -> None:
    assert load(write(tmp_path, manifest(tuning__method=method)), tmp_path).config.method == "qlora"


def test_lora_trains_on_unquantised_weights(tmp_path: Path) -> None:
    job = load(write(tmp_path, manifest(tuning__method="lora")), tmp_path, config=LORA).config
    assert (job.method, job.quantization) == ("lora", None)


@pytest.mark.parametrize(("method", "file"), [("qlora", QLORA), ("lora", LORA)])
def test_stock_templates_are_accepted_word_for_word(method: str, file: Path, tmp_path: Path) -> None:
    resolved = load(write(tmp_path, manifest(tuning__method=method)), tmp_path, config=file)
    job = resolved.config
    assert (job.lora.r, job.lora.alpha, job.lora.dropout) == (8, 8, 0.0)
    assert job.training["save_strategy"] == "no"
    assert job.training["per_device_train_batch_size"] == 1
    assert "output_dir" not in job.training
    assert job.data.train_share == 1
    assert resolved.sources["lora.r"] == f"{file.name} LoraConfig.r"


def test_stock_bfloat16_is_a_preference_and_a_warning_on_v100(tmp_path: Path) -> None:
    resolved = load(SEED, tmp_path, config=QLORA)
    assert resolved.config.model.dtype == "auto"
    assert resolved.config.quantization is not None
    assert resolved.config.quantization.compute_dtype == "auto"
    assert any("Standard_NC6s_v3" in warning and "float16" in warning for warning in resolved.warnings)


def test_own_dtype_is_kept(tmp_path: Path) -> None:
    file = write(
        tmp_path, manifest(), config_map(STOCK.replace('torch_dtype: "bfloat16"', "torch_dtype: float32"))
    )
    assert load(file, tmp_path).config.model.dtype == "float32"


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


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    text = STOCK.replace("TrainingArguments:", "TrainingArguments:\n    learning_rate: 1e-5")
    assert (
        load(write(tmp_path, manifest(), config_map(text)), tmp_path).config.training["learning_rate"] == 1e-5
    )


def test_row_settings_of_trl_reach_the_encoding(tmp_path: Path) -> None:
    text = STOCK.replace("TrainingArguments:", "TrainingArguments:\n    max_length: 512\n    packing: true")
    job = load(write(tmp_path, manifest(), config_map(text)), tmp_path).config
    assert (job.encoding.max_tokens, job.encoding.batching) == (512, "packed")
    assert "max_length" not in job.training


# --- the pod -------------------------------------------------------------------------------------


def test_controllers_pod_needs_no_manifest(pod: Path) -> None:
    resolved = load(None, pod)
    job = resolved.config
    assert (job.model.path, job.model.local_files_only) == (pod / "workspace/weights", True)
    assert (job.method, job.data.folder, job.output.folder) == (
        "qlora",
        pod / "mnt/data",
        pod / "mnt/results",
    )
    assert resolved.sources["lora.r"] == "training_config.yaml LoraConfig.r"


@pytest.mark.parametrize(
    ("written", "lands"),
    [
        ("/mnt/results", "mnt/results"),
        ("results", "mnt/results"),
        ("/foo", "mnt/foo"),
        ("a/../b", "mnt/b"),
        ("", "mnt/output"),
    ],
)
def test_output_dir_follows_the_controllers_rule_in_its_layout(written: str, lands: str, pod: Path) -> None:
    text = STOCK.replace('"/mnt/results"', json.dumps(written))
    (pod / "mnt/config/training_config.yaml").write_text(text)
    assert load(None, pod).config.output.folder == pod / lands


@pytest.mark.parametrize("written", ["..", "/", "/mnt/../etc", "/mnt"])
def test_output_dir_outside_mnt_is_refused_in_its_layout(written: str, pod: Path) -> None:
    text = STOCK.replace('"/mnt/results"', json.dumps(written))
    (pod / "mnt/config/training_config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"output_dir is .*below /mnt"):
        load(None, pod)


def test_laptop_user_writes_where_they_say(tmp_path: Path) -> None:
    text = STOCK.replace("/mnt/results", "out/here")
    assert load(write(tmp_path, manifest(), config_map(text)), tmp_path).config.output.folder == Path(
        "out/here"
    )


def test_data_environment_is_honoured(pod: Path) -> None:
    environ = {"DATA_URLS": "http://a/x.parquet http://a/y.parquet", "DATASET_FOLDER_PATH": "/elsewhere"}
    resolved = load(None, pod, environ=environ)
    assert resolved.config.data.urls == ("http://a/x.parquet", "http://a/y.parquet")
    assert resolved.config.data.folder == Path("/elsewhere")
    assert resolved.sources["data.urls"] == "environment DATA_URLS"


SPLIT = "k_proj,q_proj,v_proj,o_proj,gate_proj,down_proj,up_proj"


@pytest.mark.parametrize("target", [None, "phi-3-mini-4k-instruct"])
def test_split_targets_of_phi_3_become_its_fused_ones(target: str | None, pod: Path) -> None:
    resolved = load(target, pod, environ={"DEFAULT_TARGET_MODULES": SPLIT})
    assert set(resolved.config.lora.targets) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert any("qkv_proj" in warning and "k_proj" in warning for warning in resolved.warnings)


def test_users_own_targets_win_over_the_environment(pod: Path) -> None:
    (pod / "mnt/config/training_config.yaml").write_text(
        STOCK.replace("r: 8", "r: 8\n    target_modules: [qkv_proj]")
    )
    resolved = load(None, pod, environ={"DEFAULT_TARGET_MODULES": SPLIT})
    assert resolved.config.lora.targets == ("qkv_proj",)
    assert not any("qkv_proj" in warning for warning in resolved.warnings)


def test_split_targets_stay_where_the_model_has_them(pod: Path) -> None:
    resolved = load("qwen2.5-coder-7b-instruct", pod, environ={"DEFAULT_TARGET_MODULES": SPLIT})
    assert resolved.config.lora.targets == tuple(SPLIT.split(","))


@pytest.mark.parametrize(
    "place", ["tmp/.docker/config/config.json", "root/.docker/config.json", "root/.docker/config.d/in/a.json"]
)
def test_mounted_push_secret_is_found(place: str, pod: Path) -> None:
    file = pod / place
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    found = load(None, pod, overrides={"--output": ["registry.example.com/a/b:1"]}).config.output.credentials
    assert found in (file, pod / "root/.docker/config.d")


def test_secrets_of_another_user_are_passed_by(tmp_path: Path) -> None:
    """A container that runs as 12345 may not even look below /root."""
    (tmp_path / "root").mkdir(mode=0)
    user = os.geteuid()
    try:
        os.seteuid(12345 if user == 0 else user)
        assert Mounts(tmp_path, {}).credentials() is None
    finally:
        os.seteuid(user)


def test_hub_token_is_taken_from_the_environment_and_never_written(pod: Path) -> None:
    resolved = load(None, pod, environ={"HF_TOKEN": "hf_secretsecret"})
    assert resolved.config.hub_token is not None
    assert resolved.config.hub_token.get_secret_value() == "hf_secretsecret"
    assert "hf_secret" not in resolved.config.model_dump_json() + str(resolved)


def test_volume_of_the_host_is_used_directly(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        manifest(
            tuning__input={"volumeSource": {"hostPath": {"path": "/data/in"}}},
            tuning__output={"volumeSource": {"hostPath": {"path": "/data/out"}}},
        ),
    )
    job = load(file, tmp_path).ready()
    assert (job.data.folder, job.output.folder, job.output.image) == (
        Path("/data/in"),
        Path("/data/out"),
        None,
    )


# --- flags ---------------------------------------------------------------------------------------


def test_flags_win_and_say_so(tmp_path: Path) -> None:
    overrides = {
        "lora.r": 4,
        "LoraConfig.lora_alpha": 64,
        "training.seed": 7,
        "TrainingArguments.max_steps": 3,
    }
    resolved = load(SEED, tmp_path, config=QLORA, overrides=overrides)
    job = resolved.config
    assert (job.lora.r, job.lora.alpha, job.training["seed"], job.training["max_steps"]) == (4, 64, 7, 3)
    assert resolved.sources["lora.r"] == "flag --set lora.r"
    assert resolved.sources["lora.alpha"] == "flag --set LoraConfig.lora_alpha"
    assert resolved.sources["training.seed"] == "flag --set training.seed"
    assert resolved.sources["training.max_steps"] == "flag --set TrainingArguments.max_steps"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lorra.r", 8, "unknown setting.*'lora'"),
        ("lora.rank", 8, r"--set: unknown key 'lora\.rank'"),
        ("lora.r", "eight", r"--set: 'lora\.r' is 'eight'"),
        ("training.learning_rat", 1, "'learning_rat'.*'learning_rate'"),
        ("LoraConfig.rr", 1, r"unknown key 'LoraConfig\.rr'"),
        ("hub_token", "x", "HF_TOKEN"),
        ("data", 1, r"data\.urls"),
    ],
)
def test_wrong_flag_is_named(name: str, value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(SEED, tmp_path, overrides={name: value})


@pytest.mark.parametrize(
    ("word", "image"),
    [
        ("oci:./x", True),
        ("registry.example.com/a/b:1", True),
        ("localhost:5000/a", True),
        ("me/adapter:1", True),
        ("docker://a/b", True),
        ("./a/b", False),
        ("results/run1", False),
        ("/abs/x:1", False),
        ("~/x", False),
        ("out", False),
        ("../a.b/c", False),
    ],
)
def test_output_word_is_an_image_or_a_directory(word: str, image: bool) -> None:
    assert is_image(word) is image


def test_data_flag_takes_file_directory_address_and_image(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.touch()
    results = {
        word: load(SEED, tmp_path, overrides={"--data": [word]}).config.data
        for word in (str(file), str(tmp_path), "https://x.example/y.parquet", "oci:layout:data")
    }
    assert results[str(file)].file == file
    assert results[str(tmp_path)].folder == tmp_path
    assert results["https://x.example/y.parquet"].urls == ("https://x.example/y.parquet",)
    assert results["oci:layout:data"].image == "oci:layout:data"
    assert [bool(data.urls) for data in results.values()] == [False, False, True, False]


@pytest.mark.parametrize("model", ["phi-4", "microsoft/phi-4", "someone/a-model"])
def test_model_without_manifest_or_data_is_told_about_data(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        load(model, tmp_path)


def test_model_without_manifest_takes_the_rows_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    job = load("phi-4", tmp_path, overrides={"--data": [str(tmp_path / "rows.jsonl")]}).config
    assert job.model.repository == "microsoft/phi-4"


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning__preset__nam": "x"}, r"unknown key 'tuning\.preset\.nam' \(did you mean 'name'"),
        (
            {"tuning__preset__name": "phi-3-mini-128k-instuct"},
            "tuning.preset.name.*'phi-3-mini-128k-instruct'",
        ),
        ({"tuning__method": "full"}, r"'tuning\.method' is 'full'"),
        ({"tuning__input__urls": "http://x"}, r"'tuning\.input\.urls' is 'http://x'"),
        ({"tuning__input__urls": ["file:///etc/passwd"]}, "expected addresses with http"),
        (
            {"tuning__input": {"urls": ["http://x"], "image": "y"}},
            "exactly one of 'urls', 'image' and 'volumeSource'",
        ),
        ({"tuning__output": {}}, "exactly one of 'image' and 'volumeSource'"),
        ({"tuning__output": None}, r"'tuning\.output' is missing"),
        ({"tuning": None}, "exactly one of 'tuning' and 'inference'"),
        ({"inference": {"preset": {"name": "phi-4"}}}, "exactly one of 'tuning' and 'inference'"),
        ({"apiVersion": "kaito.sh/v2"}, "'apiVersion' is 'kaito.sh/v2', expected kaito.sh/v1alpha1"),
        ({"kind": "Workspac"}, "kind: Workspace.*found Workspac"),
        ({"tuning__preset__name": "gpt-oss-20b"}, "can be served but not tuned"),
        ({"tuning__input": {"volume": {}}}, "did you mean 'volumeSource'"),
    ],
)
def test_wrong_manifest_is_one_line_with_the_key(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path, manifest(**changes))
    with pytest.raises(ConfigError, match=message) as caught:
        load(file, tmp_path)
    assert "\n" not in str(caught.value)
    assert "job.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("LoraConfig:", "LoraConfg:", "unknown key 'LoraConfg'.*'LoraConfig'"),
        ("lora_alpha: 8", "lora_alpa: 8", r"unknown key 'LoraConfig\.lora_alpa'.*'lora_alpha'"),
        ("lora_dropout: 0.0", "lora_dropout: x", "'lora_dropout' is 'x'"),
        ("r: 8", "r: 0", "'r' is 0"),
        (
            "load_in_4bit: true",
            "load_in_4bit: true\n    load_in_8bit: true",
            "'load_in_4bit' and 'load_in_8bit' true",
        ),
        ("load_in_4bit: true", "load_in_4bit: false", "method qlora needs 'load_in_4bit: true'"),
        ("load_in_4bit: true", "load_in_4bit: maybe", r"'QuantizationConfig\.load_in_4bit' is 'maybe'"),
        ("shuffle_dataset: true", "shuffle_dataset: maybe", r"'DatasetConfig\.shuffle_dataset' is 'maybe'"),
        ("train_test_split: 1", "train_test_split: 1.5", r"'DatasetConfig\.train_test_split' is 1\.5"),
        ('output_dir: "/mnt/results"', "output_dir: 3", "output_dir"),
        ('torch_dtype: "bfloat16"', "torch_dtype: fp8", "expected auto, bfloat16, float16 or float32"),
        ('device_map: "auto"', "chat_template: nowhere.jinja", "no chat template 'nowhere.jinja'"),
        (
            "per_device_train_batch_size: 1",
            "per_device_train_batchsize: 1",
            "TrainingArguments.*'per_device_train_batchsize'",
        ),
        ("training_config:", "trainning_config:", "did you mean 'training_config'"),
        ("  LoraConfig:\n    r: 8", "  LoraConfig:\n    r: 8\n    r: 9", "written twice"),
        ("mlm: true", "mlmm: true", r"'DataCollator\.mlmm'.*'mlm'"),
    ],
)
def test_wrong_training_config_is_one_line_with_the_key(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    assert old in STOCK
    config.write_text(STOCK.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        load(SEED, tmp_path, config=config)
    assert "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_method_lora_refuses_quantisation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method lora trains on unquantised weights"):
        load(write(tmp_path, manifest(tuning__method="lora")), tmp_path, config=QLORA)


@pytest.mark.parametrize(
    "section", ["ModelConfig", "LoraConfig", "TrainingArguments", "DataCollator", "DatasetConfig"]
)
def test_empty_section_is_its_defaults(section: str, tmp_path: Path) -> None:
    document = yaml.safe_load(STOCK)
    document["training_config"][section] = None
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(document))
    load(SEED, tmp_path, config=config)


def test_lora_keys_are_those_of_peft() -> None:
    import dataclasses

    from peft import LoraConfig

    assert LORA_OPTIONS | LORA_OURS | LoraSection.model_fields.keys() == {
        f.name for f in dataclasses.fields(LoraConfig)
    }


def test_inference_manifest_is_sent_to_serve_and_back(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runtime serve"):
        load(SERVE, tmp_path)
    with pytest.raises(ConfigError, match="runtime tune"):
        load_server(SEED, environ={}, root=tmp_path)


# --- serving -------------------------------------------------------------------------------------


def test_inference_manifest_becomes_its_server(tmp_path: Path) -> None:
    resolved = load_server(SERVE, environ={}, root=tmp_path)
    config = resolved.config
    assert config.served_name == "phi-3-mini-128k-instruct"
    adapter = config.adapters[0]
    assert (adapter.name, adapter.strength) == ("dolly", 1.0)
    assert adapter.reference.endswith("IMAGE_NAME_HERE:0.0.1")
    with pytest.raises(ConfigError, match="placeholder"):
        resolved.ready()


def test_mounted_weights_are_all_a_server_needs(tmp_path: Path) -> None:
    weights = tmp_path / "workspace/weights"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    server = load_server(None, environ={}, root=tmp_path).config
    assert (server.served_name, server.model.path) == ("weights", weights)
    (weights / "preset.txt").write_text("phi-3-mini-128k-instruct\n")
    server = load_server(None, environ={}, root=tmp_path).config
    assert (server.served_name, server.model.path) == ("phi-3-mini-128k-instruct", weights)


def test_mounted_adapters_are_served_at_their_strength(tmp_path: Path) -> None:
    for name in ("dolly", "my-lora.v2"):
        (tmp_path / "mnt/adapter" / name).mkdir(parents=True)
        (tmp_path / "mnt/adapter" / name / "adapter_config.json").write_text("{}")
    config = load_server(SERVE, environ={"my-lora.v2": "0.25"}, root=tmp_path).ready()
    assert {a.name: (a.reference, a.strength) for a in config.adapters} == {
        "dolly": (str(tmp_path / "mnt/adapter/dolly"), 1.0),
        "my-lora.v2": (str(tmp_path / "mnt/adapter/my-lora.v2"), 0.25),
    }


def test_wrong_strength_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="environment dolly: strength is '2', expected a number from 0 to 1"
    ):
        load_server(SERVE, environ={"dolly": "2"}, root=tmp_path)


def test_engine_settings_of_inference_config_are_taken_or_named(tmp_path: Path) -> None:
    (tmp_path / "mnt/config").mkdir(parents=True)
    text = "max_probe_steps: 6\nvllm:\n  max-model-len: 4096\n  swap-space: 4\n"
    (tmp_path / "mnt/config/inference_config.yaml").write_text(text)
    resolved = load_server("phi-4", environ={}, root=tmp_path)
    assert resolved.config.limits.context_tokens == 4096
    assert any("vllm.swap-space" in w and "max_probe_steps" in w for w in resolved.warnings)
    by_vllm = load_server("phi-4", environ={}, overrides={"engine": "vllm"}, root=tmp_path)
    assert by_vllm.config.limits.context_tokens == 4096
    assert by_vllm.config.vllm.flags == {"swap-space": 4}
    assert by_vllm.sources["vllm.flags.swap-space"].endswith("inference_config.yaml")
    assert not any("swap-space" in w for w in by_vllm.warnings)


@pytest.mark.parametrize(
    ("word", "reference", "strength"),
    [
        ("a=./x", "./x", 1.0),
        ("a=oci:d:t@0.5", "oci:d:t", 0.5),
        ("a=r.io/x@sha256:ab", "r.io/x@sha256:ab", 1.0),
    ],
)
def test_adapter_flag_holds_reference_and_strength(
    word: str, reference: str, strength: float, tmp_path: Path
) -> None:
    adapter = load_server(
        "phi-4", environ={}, root=tmp_path, overrides={"--adapter": [word]}
    ).config.adapters[0]
    assert (adapter.reference, adapter.strength) == (reference, strength)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (
            [{"source": {"name": "a", "image": "x"}}, {"source": {"name": "a", "image": "y"}}],
            "two adapters named 'a'",
        ),
        ([{"source": {"name": "a", "image": "x"}, "strength": "1.5"}], "strength"),
        ([{"source": {"name": "a", "urls": ["http://x"]}}], "not possible for an adapter"),
        ([{"source": {"image": "x"}}], "'source.name' is missing"),
        ([{"source": {"name": "a"}}], "exactly one of 'image' and 'volumeSource'"),
        ([{"source": {"name": f"a{n}", "image": "x"}} for n in range(11)], "at most 10"),
    ],
)
def test_wrong_adapters_are_refused(adapters: list[Any], message: str, tmp_path: Path) -> None:
    document = yaml.safe_load(SERVE.read_text())
    document["inference"]["adapters"] = adapters
    with pytest.raises(ConfigError, match=message):
        load_server(write(tmp_path, document), environ={}, root=tmp_path)


@pytest.mark.parametrize(("environ", "warned"), [({}, True), ({"HF_TOKEN": "hf_x"}, False)])
def test_gated_model_without_a_token_is_warned_of(
    environ: dict[str, str], warned: bool, tmp_path: Path
) -> None:
    file = write(tmp_path, manifest(tuning__preset__name="llama-3.1-8b-instruct"))
    for resolved in (
        load(file, tmp_path, environ=environ),
        load_server("llama-3.1-8b-instruct", environ=environ, root=tmp_path),
    ):
        assert any("is gated" in warning for warning in resolved.warnings) is warned


# --- layers --------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "a.b", "a.c", "b.a.c", "a.b.c"])


@given(st.lists(st.tuples(names, st.integers())))
def test_last_layer_wins_and_names_its_source(layers: list[tuple[str, int]]) -> None:
    settings = LayeredSettings()
    for place, (name, value) in enumerate(layers):
        settings.put(name, value, f"layer {place}")
        assert settings.get(name) == value
    for name, value in flatten(settings.values).items():
        place = max(place for place, (written, _) in enumerate(layers) if written == name)
        assert settings.sources[name] == f"layer {place}"
        assert layers[place][1] == value


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
)


@given(
    st.sampled_from(
        [
            "tuning",
            "tuning__input",
            "tuning__output",
            "tuning__preset",
            "resource",
            "metadata",
            "tuning__method",
        ]
    ),
    values,
)
def test_no_manifest_fails_otherwise_than_readably(
    tmp_path_factory: pytest.TempPathFactory, path: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("any")
    document = manifest(**{path: value if value is not None else ""})
    try:
        load(write(folder, document), folder)
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("written", "parallel"),
    [("full_shard auto_wrap", "fsdp"), ("true", "fsdp"), ('""', "ddp"), ("false", "ddp"), ("null", "ddp")],
)
def test_trainers_fsdp_shards_the_base(tmp_path: Path, written: str, parallel: str) -> None:
    text = (
        "training_config:\n  QuantizationConfig: {load_in_4bit: true}\n"
        f"  TrainingArguments:\n    fsdp: {written}\n    fsdp_config: {{min_num_params: 1}}\n"
    )
    resolved = load(SEED, tmp_path, config=write(tmp_path, config_map(text)))
    assert resolved.config.parallel == parallel
    assert not {"fsdp", "fsdp_config"} & resolved.config.training.keys()
    assert any("fsdp_config has no effect here" in warning for warning in resolved.warnings)
