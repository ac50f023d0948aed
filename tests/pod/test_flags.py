"""Flags, variables and mounts of a controller's pod: what they become, without a container."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.pod import ancestors, flags, inference
from runtime.pod.inference import transformers_server, vllm_server

STOCK = ["--torch_dtype=auto", "--pipeline=text-generation", "--trust_remote_code"]
HEAD = [
    *STOCK, "--served_model_name=phi-4", "--pretrained_model_name_or_path=microsoft/phi-4",
    "--allow_remote_files", "--revision=" + "a" * 40,
]  # fmt: skip
CUSTOM = [
    "--pipeline", "text-generation", "--trust_remote_code", "--allow_remote_files",
    "--pretrained_model_name_or_path", "acme/m", "--torch_dtype", "float16",
]  # fmt: skip


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    """A root directory with mounted weights and one adapter."""
    weights = tmp_path / "workspace/weights"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    adapter = tmp_path / "mnt/adapter/my-lora.v2"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    return tmp_path


@given(st.permutations(HEAD))
def test_flags_mean_the_same_in_any_order(words: list[str]) -> None:
    """Controllers write them in the order of a Go map: another one at each reconcile."""
    config = transformers_server(words, {}, Path("/nowhere")).config
    assert (config.served_name, config.model.repository, config.model.revision) == (
        "phi-4",
        "microsoft/phi-4",
        "a" * 40,
    )
    assert (config.port, config.model.local_files_only, config.model.trust_remote_code) == (
        5000,
        False,
        False,
    )


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), st.from_regex(r"[\w./=-]{0,8}", fullmatch=True)
    )
)
def test_both_ways_to_write_a_value_are_read(values: dict[str, str]) -> None:
    assert flags.read([f"--{name}={value}" for name, value in values.items()]) == values
    apart = {name: value for name, value in values.items() if not value.startswith("-")}
    assert flags.read([word for name, value in apart.items() for word in (f"--{name}", value)]) == apart


def test_values_apart_from_their_flags_are_read() -> None:
    config = transformers_server(CUSTOM, {}, Path("/nowhere")).config
    assert (config.model.repository, config.model.dtype, config.served_name) == ("acme/m", "float16", "m")


def test_negative_numbers_are_values_and_bare_flags_are_true() -> None:
    assert flags.read(["--seed", "-1", "--enable-lora", "--x=", "stray"]) == {
        "seed": "-1",
        "enable_lora": None,
        "x": "",
    }
    assert [flags.truth(word) for word in (None, "False", "yes", "maybe")] == [True, False, True, None]


def test_flags_of_other_programs_are_named_once_and_dropped(
    pod: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = transformers_server(
        [*STOCK, "--combination_type=svd", "--gpu-memory-utilization", "0.8"], {}, pod
    ).config
    assert config.model.path == pod / "workspace/weights"
    (line,) = [record.message for record in caplog.records if "without meaning" in record.message]
    assert "combination_type, gpu_memory_utilization, trust_remote_code" in line


def test_mounted_weights_serve_without_any_flag(pod: Path) -> None:
    config = transformers_server([], {}, pod).config
    assert (config.model.path, config.served_name) == (pod / "workspace/weights", "weights")


def test_default_path_of_the_flag_means_the_mount(pod: Path) -> None:
    config = transformers_server(["--pretrained_model_name_or_path=/workspace/tfs/weights"], {}, pod).config
    assert config.model.path == pod / "workspace/weights"


def test_remote_files_need_leave() -> None:
    config = transformers_server(["--pretrained_model_name_or_path=acme/m"], {}, Path("/nowhere")).config
    assert config.model.local_files_only


def test_each_local_rank_has_its_port(pod: Path) -> None:
    assert transformers_server([], {"LOCAL_RANK": "3"}, pod).config.port == 5003
    assert vllm_server(["--port=5001"], {}, pod).config.port == 5001
    with pytest.raises(ConfigError, match="LOCAL_RANK is 'x', expected a whole number"):
        transformers_server([], {"LOCAL_RANK": "x"}, pod)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--pipeline=summarization", "expected text-generation or conversational"),
        ("--torch_dtype=int4", "expected auto, bfloat16, float16 or float32"),
        ("--port=http", "expected a whole number"),
        ("--chat_template=/nowhere/x.jinja", "no chat template '/nowhere/x.jinja'"),
    ],
)
def test_a_wrong_value_is_one_line(word: str, message: str, pod: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        transformers_server([word], {}, pod)


def test_presets_chat_template_is_found_where_images_had_it(pod: Path) -> None:
    config = transformers_server(
        ["--chat_template=/workspace/chat_templates/mistral-instruct.jinja"], {}, pod
    ).config
    assert "[INST]" in (config.model.chat_template or "")


def test_vllm_flags_are_mapped(pod: Path) -> None:
    words = [
        "--model=/workspace/vllm/weights", "--served-model-name=phi-4", "--max-model-len=1024",
        "--max-num-seqs=4", "--dtype=half", "--quantization=bitsandbytes", "--tensor-parallel-size=1",
        "--enable-lora", "--kv-events-config={}", "--download-dir=/workspace/weights",
        "--gpu-memory-utilization=0.84",
    ]  # fmt: skip
    config = vllm_server(words, {"VLLM_API_KEY": "k"}, pod).config
    assert (config.served_name, config.limits.context_tokens, config.limits.rows) == ("phi-4", 1024, 4)
    assert config.model.dtype == "float16"
    assert config.quantization is not None
    assert config.api_key is not None
    assert [adapter.name for adapter in config.adapters] == ["my-lora.v2"]
    assert vllm_server(["--max-model-len=auto"], {}, pod).config.limits.context_tokens is None
    assert inference.download_folder(words) == "/workspace/weights"


def test_strength_is_the_variable_named_like_the_adapter(pod: Path) -> None:
    config = transformers_server([], {"my-lora.v2": "0.25"}, pod).config
    assert [(a.name, a.strength) for a in config.adapters] == [("my-lora.v2", 0.25)]


def test_requests_without_a_name_are_answered_as_each_runtime_did(pod: Path) -> None:
    """transformers': by all adapters together; vLLM's: by the base."""
    assert transformers_server([], {}, pod).config.combine_adapters
    assert not vllm_server([], {}, pod).config.combine_adapters


def test_strength_that_a_shell_dropped_is_found_with_its_ancestors(tmp_path: Path) -> None:
    proc = tmp_path
    for pid, parent, block in (
        (30, 20, b"A=1"),
        (20, 1, b"my-lora.v2=0.5\0B=2"),
        (1, 0, b"my-lora.v2=0.9\0other=3"),
    ):
        (proc / str(pid)).mkdir()
        (proc / str(pid) / "environ").write_bytes(block)
        (proc / str(pid) / "stat").write_text(f"{pid} (a) b (sh) S {parent} 1 1")
    found = ancestors.recover({"C": "3"}, ["my-lora.v2", "other", "absent"], pid=30, proc=proc)
    assert found == {"C": "3", "my-lora.v2": "0.5", "other": "3"}
    assert ancestors.recover({"other": "mine"}, ["other"], pid=30, proc=proc) == {"other": "mine"}
