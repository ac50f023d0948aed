"""An inference manifest, a preset, mounts and flags become one server."""

from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.workspace import load_server
from tests.workspace.documents import SERVE


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
    (weights / "config.json").write_text('{"model_type": "phi3"}')
    (weights / "model.safetensors").touch()
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


def test_a_half_written_mounted_adapter_is_there_to_be_refused_by_name(tmp_path: Path) -> None:
    """It was left out without a word."""
    folder = tmp_path / "mnt/adapter/half"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").touch()
    config = load_server("phi-4", environ={}, root=tmp_path).config
    assert [adapter.name for adapter in config.adapters] == ["half"]


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
    assert any("swap-space" in w and "max_probe_steps" in w for w in resolved.warnings)
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
        (f"a=r.io/x@sha256:{'ab' * 32}", f"r.io/x@sha256:{'ab' * 32}", 1.0),
    ],
)
def test_adapter_flag_holds_reference_and_strength(
    word: str, reference: str, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "x/adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    adapter = load_server(
        "phi-4", environ={}, root=tmp_path, overrides={"--adapter": [word]}
    ).config.adapters[0]
    assert (adapter.reference, adapter.strength) == (reference, strength)


def test_a_preset_that_only_vllm_serves_is_refused_when_settings_are_resolved() -> None:
    with pytest.raises(ConfigError, match="--engine vllm may serve it"):
        load_server("ministral-3-3b-instruct", environ={})
    config = load_server("ministral-3-3b-instruct", environ={}, overrides={"engine": "vllm"}).config
    assert config.engine == "vllm"
