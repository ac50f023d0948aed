"""Models that a device cannot compute are refused by their configuration, before anything is downloaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime import gpus, support
from runtime.errors import ConfigError
from runtime.hardware import Hardware
from runtime.model_source import ModelSource, Quantization
from runtime.presets import source

V100 = gpus.of_kind("V100-16GB")
T4 = gpus.of_kind("T4-16GB")
A100 = gpus.of_kind("A100-80GB")
CPU = Hardware("cpu", "CPU", None, 8 << 30, 1)


def model(folder: Path, model_type: str, dtype: str = "auto", **config: Any) -> ModelSource:
    """Return a model of which only the configuration is there."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    return ModelSource.model_validate({"name": "m", "path": folder, "dtype": dtype})


@pytest.mark.parametrize("gpu", [V100, T4], ids=["V100", "T4"])
@pytest.mark.parametrize("name", ["gemma-3-4b-instruct", "gemma-3-27b-instruct", "gpt-oss-20b"])
def test_presets_that_overflow_float16_are_refused_without_bfloat16(name: str, gpu: Hardware) -> None:
    with pytest.raises(
        ConfigError, match=r"exceed 65504.*compute capability 8\.0 or newer, or float32"
    ) as no:
        support.check_server(source(name), None, gpu)
    assert name in str(no.value)
    assert gpu.name in str(no.value)
    support.check_server(source(name), None, A100)
    support.check_server(source(name).model_copy(update={"dtype": "float32"}), None, gpu)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "gemma3n", "glm4", "deepseek_v2"])
def test_a_directory_is_refused_by_its_configuration(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"activations of {kind} models exceed"):
        support.check_server(model(tmp_path, kind), None, V100)


@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen2", "phi", "falcon", "gemma", "gemma4", "unheard_of"])
def test_what_stays_within_float16_is_served(kind: str, tmp_path: Path) -> None:
    support.check_server(model(tmp_path, kind), None, V100)


@pytest.mark.parametrize("kind", ["gemma4", "qwen3_moe", "qwen3_5"])
def test_gradients_that_overflow_refuse_tuning_only(kind: str, tmp_path: Path) -> None:
    served = model(tmp_path, kind)
    support.check_server(served, None, V100)
    with pytest.raises(ConfigError, match=f"gradients of {kind} models exceed"):
        support.check_tuner(served, V100, dtype="float16", how="")
    support.check_tuner(served, V100, dtype="float32", how="")


def test_float16_by_hand_is_refused_everywhere(tmp_path: Path) -> None:
    half = model(tmp_path, "gemma3_text", "float16")
    with pytest.raises(ConfigError, match="leave the dtype at auto, which is bfloat16 on A100-80GB"):
        support.check_server(half, None, A100)
    with pytest.raises(ConfigError, match="leave the dtype at auto"):
        support.check_server(half, None, CPU)
    quantised = Quantization(compute_dtype="float16")
    with pytest.raises(ConfigError, match="leave the dtype at auto"):
        support.check_server(model(tmp_path, "gemma3_text"), quantised, A100)


def test_float32_of_a_quantised_model_is_set_in_both_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set quantization\.compute_dtype=float32"):
        support.check_server(model(tmp_path, "gemma3_text"), Quantization(), V100)
    whole = model(tmp_path, "gemma3_text", "float32")
    support.check_server(whole, Quantization(compute_dtype="float32"), V100)


def test_a_configuration_that_cannot_be_read_is_left_to_loading(tmp_path: Path) -> None:
    assert support.model_type(ModelSource(name="m", path=tmp_path)) is None
    (tmp_path / "config.json").write_text("[1]")
    assert support.model_type(ModelSource(name="m", path=tmp_path)) is None
    (tmp_path / "config.json").write_text("{")
    assert support.model_type(ModelSource(name="m", path=tmp_path)) is None


@pytest.mark.parametrize("name", ["ministral-3-3b-instruct", "ministral-3-8b-instruct", "qwen3-8b-awq"])
def test_what_only_vllm_serves_is_said_before_the_download(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model {name}: .*--engine vllm"):
        support.check_server(source(name), None, A100)
    support.check_server(source(name), None, A100, engine="vllm")
    with pytest.raises(ConfigError, match=f"model {name}: .*(cannot be tuned|quantised already)"):
        support.check_tuner(source(name), A100, dtype="bfloat16", how="")


@pytest.mark.parametrize(
    ("method", "package"),
    [("awq", "gptqmodel"), ("compressed-tensors", "compressed_tensors"), ("new", "for new")],
)
def test_quantised_files_name_the_package_that_reads_them(method: str, package: str, tmp_path: Path) -> None:
    stored = model(tmp_path, "llama", quantization_config={"quant_method": method})
    with pytest.raises(ConfigError, match=f"quantised as {method}, which needs the package {package}"):
        support.check_server(stored, None, A100)
    with pytest.raises(ConfigError, match=r"quantised already.*tune the model that they were made from"):
        support.check_tuner(stored, A100, dtype="bfloat16", how="")


def test_quantised_files_are_not_quantised_again(tmp_path: Path) -> None:
    stored = model(tmp_path, "llama", quantization_config={"quant_method": "bitsandbytes"})
    support.check_server(stored, None, A100)
    with pytest.raises(ConfigError, match="already; leave the quantisation out"):
        support.check_server(stored, Quantization(), A100)
    support.check_tuner(stored, A100, dtype="bfloat16", how="")


def test_fp8_is_dequantised_where_no_kernels_are_needed(tmp_path: Path) -> None:
    stored = model(tmp_path, "llama", quantization_config={"quant_method": "fp8"})
    support.check_server(stored, None, A100)
    support.check_server(stored, None, CPU)
    with pytest.raises(ConfigError, match="H100-80GB computes with triton and the package kernels"):
        support.check_server(stored, None, gpus.of_kind("H100-80GB"))


def test_an_architecture_without_a_class_is_refused_unless_its_own_code_may_run(tmp_path: Path) -> None:
    support.check_architecture(model(tmp_path, "llama"))
    for kind in ("unheard_of", "t5"):
        with pytest.raises(ConfigError, match=f"transformers loads no '{kind}' as a causal language model"):
            support.check_architecture(model(tmp_path, kind))
    own = model(tmp_path, "unheard_of", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    with pytest.raises(ConfigError, match=r"--set model\.trust_remote_code=true runs the code"):
        support.check_architecture(own)
    support.check_architecture(own.model_copy(update={"trust_remote_code": True}))
