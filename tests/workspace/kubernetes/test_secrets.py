"""Secrets in a Workspace file: found wherever they stand, and in no ConfigMap."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.errors import ConfigError
from runtime.workspace import load_job, load_server
from runtime.workspace.kubernetes.secrets import is_secret, places
from tests.workspace.kubernetes.test_objects import container_of, made, of_kind, pod_of
from tests.workspace.manifests import MAP, SERVING, TUNING, serving, tuning

SIGNED = "https://example.org/a.parquet?sv=2024-01-01&sig=c2VjcmV0c2lnbmF0dXJl"


@pytest.mark.parametrize(
    "text",
    [
        SIGNED,
        "https://bucket.s3.amazonaws.com/a?X-Amz-Credential=AKIA&X-Amz-Signature=abc",
        "https://storage.googleapis.com/b/a?X-Goog-Signature=abc",
        "https://user:password@example.org/a.parquet",
        "https://ghp_token@example.org/a.parquet",
        "see http://example.org/?token=abc now",
        "hf_abcdefghijkl",
        "ghp_abcdefghijklmnopqrstu",
        "Authorization: Bearer abcdefgh",
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=abc==",
        '{"aws_secret_access_key": "abc"}',
        '[{"hf-token": "abc"}]',
        "http://[",
    ],
)
def test_texts_that_prove_who_reads_are_secrets(text: str) -> None:
    assert is_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/a.parquet?download=true",
        "https://example.org/a?ref=main&raw=1",
        "registry.example/a@sha256:" + "0" * 64,
        "phi-4",
        "{{ bos_token }}",
        '{"rope_theta": 1}',
        "<|im_end|>",
    ],
)
def test_other_texts_are_none(text: str) -> None:
    assert not is_secret(text)


def test_keys_that_hold_secrets_are_told_from_those_that_name_them() -> None:
    written: dict[str, Any] = {
        "vllm": {"api-key": ["a", "b"], "api_key": 1, "hf-token": "x", "max-num-batched-tokens": 8192},
        "ModelConfig": {"proxies": {"https": "http://u:p@proxy"}, "eos_token": "</s>", "token": None},
        "TrainingArguments": {"hub_token": "x", "push_to_hub": False},
        "preset": {"modelAccessSecret": "hub", "imagePullSecrets": ["a"]},
        "csi": {"nodePublishSecretRef": {"name": "s"}, "volumeAttributes": {"accountKey": "k"}},
    }
    assert list(places(written)) == [
        "vllm.api-key",
        "vllm.api_key",
        "vllm.hf-token",
        "ModelConfig.proxies.https",
        "TrainingArguments.hub_token",
        "csi.volumeAttributes.accountKey",
    ]


def _config(key: str, text: str) -> str:
    return "  config: mine\n" + MAP.format(name="mine", key=key, text=text)


QLORA = "training_config: {QuantizationConfig: {load_in_4bit: true}, "


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (tuning("https://example.org/a.parquet", SIGNED), "tuning.input.urls"),
        (tuning("https://example.org/a.parquet", "https://u:hunter2@e.org/a.parquet"), "tuning.input.urls"),
        (
            SERVING + _config("inference_config.yaml", "vllm: {api-key: sk-hunter2}"),
            "ConfigMap mine vllm.api-key",
        ),
        (
            TUNING
            + _config("training_config.yaml", QLORA + "ModelConfig: {proxies: {http: http://u:hunter2@p}}}"),
            "ConfigMap mine training_config.ModelConfig.proxies.http",
        ),
    ],
)
def test_secret_makes_what_the_pod_reads_a_secret(text: str, place: str, tmp_path: Path) -> None:
    objects, warnings = made(text, tmp_path)
    assert [d for d in objects if d["kind"] == "ConfigMap"] == []
    secret = of_kind("Secret", objects)
    (volume,) = [volume for volume in pod_of(objects)["volumes"] if volume["name"] == "workspace"]
    assert volume["secret"] == {"secretName": secret["metadata"]["name"]}
    others = str([d for d in objects if d["kind"] != "Secret"])
    assert "hunter2" not in others
    assert "sig=" not in others
    assert any(place in warning and "Secret w-workspace" in warning for warning in warnings)
    assert not any("hunter2" in warning or "c2Vjc" in warning for warning in warnings)


def test_pod_reads_the_same_from_a_secret(tmp_path: Path) -> None:
    signed = tuning("https://example.org/a.parquet", SIGNED)
    keyed = SERVING + _config("inference_config.yaml", "vllm: {api-key: sk-hunter2}")
    environ, pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path / "pod.yaml"
    objects = made(signed, tmp_path)[0]
    pod.write_text(of_kind("Secret", objects)["stringData"]["workspace.yaml"])
    assert load_job(pod, environ=environ).config.data.urls == (SIGNED,)
    pod.write_text(of_kind("Secret", made(keyed, tmp_path)[0])["stringData"]["workspace.yaml"])
    key = load_server(pod, environ=environ).config.api_key
    assert key is not None
    assert key.get_secret_value() == "sk-hunter2"


def test_configuration_of_a_flag_with_a_secret_is_in_the_secret_too(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("vllm: {api-key: sk-hunter2}\n")
    objects, _ = made(SERVING, tmp_path, config=config)
    assert yaml.safe_load(of_kind("Secret", objects)["stringData"]["config.yaml"]) == {
        "vllm": {"api-key": "sk-hunter2"}
    }
    assert "/etc/workspace/config.yaml" in container_of(objects)["args"]


def test_comments_of_a_configuration_are_in_no_object(tmp_path: Path) -> None:
    text = SERVING + _config("inference_config.yaml", "vllm: {}  # api-key: hunter2")
    assert "hunter2" not in str(made(text, tmp_path)[0])


def test_pod_is_told_which_config_map_is_meant(tmp_path: Path) -> None:
    objects, warnings = made(
        SERVING + MAP.format(name="mine", key="inference_config.yaml", text="vllm: {max-model-len: 4096}"),
        tmp_path,
    )
    assert any("ConfigMap mine is used" in warning for warning in warnings)
    pod = tmp_path / "pod.yaml"
    pod.write_text(of_kind("ConfigMap", objects)["data"]["workspace.yaml"])
    server = load_server(pod, environ={"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert server.config.limits.context_tokens == 4096
    assert not any("ConfigMap" in warning for warning in server.warnings)


def test_annotation_with_a_secret_is_left_out_and_said(tmp_path: Path) -> None:
    both = f"example.org/data: '{SIGNED}', kaito.sh/x: '{SIGNED}'"
    text = serving("{name: w}", f"{{name: w, annotations: {{{both}, a/b: c}}}}")
    objects, warnings = made(text, tmp_path)
    assert all(d["metadata"]["annotations"] == {"a/b": "c"} for d in objects)
    assert "sig=" not in str(objects)
    for name in ("example.org/data", "kaito.sh/x"):
        assert any(f"{name} holds a secret, so it is left out" in warning for warning in warnings)


def test_what_kubectl_remembers_is_left_out_silently(tmp_path: Path) -> None:
    kept = "kubectl.kubernetes.io/last-applied-configuration: 'https://a/?sig=hunter2'"
    objects, warnings = made(serving("{name: w}", f"{{name: w, annotations: {{{kept}}}}}"), tmp_path)
    assert "hunter2" not in str(objects)
    assert not any("holds a secret" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            serving("{name: w}", "{name: w, labels: {token: hf_abcdefghijkl}}"),
            "metadata.labels.token holds a secret",
        ),
        (
            tuning(
                'urls: ["https://example.org/a.parquet"]',
                "volumeSource: {csi: {driver: d, volumeAttributes: {storage_account_key: hunter2}}}",
            ),
            "input.volumeSource.csi.volumeAttributes.storage_account_key holds a secret",
        ),
        (
            serving("{name: phi-4}", "{name: phi-4, presetOptions: {image: 'user:hunter2@x.io/a:1'}}"),
            "a name holds no login",
        ),
    ],
)
def test_secret_that_would_stand_in_an_object_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        made(text, tmp_path)
    assert "hunter2" not in str(caught.value)


def test_config_map_of_the_user_with_a_secret_is_named(tmp_path: Path) -> None:
    others = MAP.format(name="own", key="settings.yaml", text="{api_key: hunter2}")
    warnings = made(SERVING + others, tmp_path)[1]
    assert "ConfigMap own: data.settings.yaml holds a secret, which belongs into a Secret" in warnings
