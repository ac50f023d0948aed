"""A manifest, the mounts of a pod, the environment and flags become one tuning job."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.config import flatten
from runtime.errors import ConfigError
from tests.workspace.documents import LORA, QLORA, SEED, STOCK, config_map, load, manifest, write


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


def test_placeholders_stop_only_a_real_run(tmp_path: Path) -> None:
    resolved = load(SEED, tmp_path)
    words = " ".join(resolved.placeholders)
    assert all(w in words for w in ("ACR_REPO_HERE", "IMAGE_NAME_HERE", "ACR_REGISTRY_SECRET_HERE"))
    with pytest.raises(ConfigError, match=r"tuning\.output\.image still holds the placeholder") as caught:
        resolved.ready()
    assert all(phrase in str(caught.value) for phrase in resolved.placeholders)


def test_lora_trains_on_unquantised_weights(tmp_path: Path) -> None:
    job = load(write(tmp_path, manifest(tuning__method="lora")), tmp_path, config=LORA).config
    assert (job.method, job.quantization) == ("lora", None)


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


def test_adapter_of_a_changed_workspace_replaces_the_earlier_one_where_there_are_no_flags(pod: Path) -> None:
    assert load(None, pod).config.output.overwrite
    assert not load("HuggingFaceTB/SmolLM2-135M-Instruct", pod).config.output.overwrite


@pytest.mark.parametrize("written", ["..", "/", "/mnt/../etc", "/mnt"])
def test_output_dir_outside_mnt_is_refused_in_its_layout(written: str, pod: Path) -> None:
    text = STOCK.replace('"/mnt/results"', json.dumps(written))
    (pod / "mnt/config/training_config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"output_dir is .*below /mnt"):
        load(None, pod)


def test_output_dir_outside_a_pod_is_used_as_written(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("model", ["phi-4", "microsoft/phi-4", "someone/a-model"])
def test_model_without_manifest_or_data_is_an_error_that_names_the_flag(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        load(model, tmp_path)


def test_model_without_manifest_takes_the_rows_of_the_flag(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    job = load("phi-4", tmp_path, overrides={"--data": [str(tmp_path / "rows.jsonl")]}).config
    assert job.model.repository == "microsoft/phi-4"


@pytest.mark.parametrize(
    ("environ", "host", "source"),
    [
        ({}, "127.0.0.1", "default"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "0.0.0.0", "pod"),
        ({"RUNTIME_METRICS_HOST": "0.0.0.0"}, "0.0.0.0", "environment RUNTIME_METRICS_HOST"),
    ],
)
def test_metrics_of_a_plain_run_are_for_this_machine_alone(
    environ: dict[str, str], host: str, source: str, tmp_path: Path
) -> None:
    resolved = load(SEED, tmp_path, environ=environ)
    assert (resolved.config.metrics_host, resolved.sources["metrics_host"]) == (host, source)
    flag = load(SEED, tmp_path, environ=environ, overrides={"metrics_host": "::1"})
    assert flag.config.metrics_host == "::1"


@pytest.mark.parametrize(
    "name", ["load_in_4bit", "QuantizationConfig.load_in_4bit", "ModelConfig.load_in_4bit"]
)
def test_no_quantisation_on_the_command_line_is_as_in_a_file(name: str, tmp_path: Path) -> None:
    job = load("phi-4", tmp_path, overrides={name: False, "--data": [str(QLORA)]}).config
    assert (job.method, job.quantization) == ("lora", None)


def test_quantisation_and_method_of_the_command_line_must_agree(tmp_path: Path) -> None:
    for method, value in (("qlora", False), ("lora", True)):
        with pytest.raises(ConfigError, match="method"):
            load(
                "phi-4", tmp_path, overrides={"load_in_4bit": value, "method": method, "--data": [str(QLORA)]}
            )


def test_a_dry_run_says_what_the_run_would_refuse_or_look_up(tmp_path: Path) -> None:
    given: dict[str, Any] = {"--data": [str(QLORA)]}
    with pytest.raises(ConfigError, match="the package clearml is not installed"):
        load("phi-4", tmp_path, overrides={"report_to": "clearml", **given})
    (said,) = load("phi-4", tmp_path, overrides={"revision": "abc", **given}).warnings
    assert "flag --set model.revision is 'abc', no commit (40 hex digits)" in said
    assert not load("phi-4", tmp_path, overrides={"revision": "ab" * 20, **given}).warnings


def test_fetched_data_is_found_again_when_its_signature_is_renewed(tmp_path: Path) -> None:
    def folder(*urls: str) -> Path:
        return load("phi-4", tmp_path, overrides={"--data": urls}).config.data.folder

    signed = "https://host.test/rows.parquet?sv=2024&sp=r&sig={}"
    assert folder(signed.format("first")) == folder(signed.format("renewed"))
    assert folder(signed.format("first") + "&part=2") != folder(signed.format("first"))
