"""inference_api.py of both runtimes: what flags, variables and mounts become, and the server they start."""

import logging
import sys
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import ports
from runtime.errors import ConfigError
from runtime.pod import benchmark, inference, probes
from runtime.pod.inference import transformers_server, vllm_server
from tests.pod.processes import FILES, answer, free_port, started
from tests.pod.test_benchmark import controller_reads

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
    (weights / "config.json").write_text('{"model_type": "phi3"}')
    (weights / "model.safetensors").touch()
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


def test_values_in_a_word_of_their_own_are_read() -> None:
    config = transformers_server(CUSTOM, {}, Path("/nowhere")).config
    assert (config.model.repository, config.model.dtype, config.served_name) == ("acme/m", "float16", "m")


def test_flags_without_effect_are_named_with_the_reason(pod: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    words = [
        *STOCK,
        "--force_download",
        "--resume_download",
        "--combination_type=svd",
        "--device_map",
        "auto",
    ]
    assert transformers_server(words, {}, pod).config.model.path == pod / "workspace/weights"
    (line,) = [record.message for record in caplog.records if "without effect" in record.message]
    assert "force_download, resume_download: downloads are resumed and checked" in line
    assert "trust_remote_code: models run on the library's own classes" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--load_in_4bti"], "--load_in_4bti: unknown flag .did you mean 'load_in_4bit'"),
        (["--gpu-memory-utilization", "0.8"], "--gpu_memory_utilization: unknown flag"),
        (["--combination_type=ties"], "--combination_type is 'ties', which is not served here: adapters are"),
        (["--device_map=cpu"], "CUDA_VISIBLE_DEVICES"),
        (["--from_tf"], "safetensors alone"),
        (["--cache_dir=/x"], "--cache_dir is not served here: set HF_HOME"),
        (["--pretrained_model_name_or_path"], "--pretrained_model_name_or_path: expected a value"),
        (["--torch_dtype="], "--torch_dtype: expected a value"),
        (["--port", "--pipeline=text-generation"], "--port: expected a value"),
    ],
)
def test_transformers_flags_that_ask_for_something_else_are_refused(
    words: list[str], message: str, pod: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        transformers_server(words, {}, pod)


def test_every_word_for_a_type_means_the_same_in_both_runtimes(pod: Path) -> None:
    for word, dtype in {"half": "float16", "float": "float32", "bfloat16": "auto", "auto": "auto"}.items():
        assert transformers_server([f"--torch_dtype={word}"], {}, pod).config.model.dtype == dtype
        assert vllm_server([f"--dtype={word}"], {}, pod).config.model.dtype == dtype


@pytest.mark.parametrize("resolve", [transformers_server, vllm_server])
def test_help_shows_what_becomes_of_each_flag(
    resolve: inference.Resolve, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inference.main(resolve, ["--help"], {}) == 0
    said = capsys.readouterr().out
    assert "usage: inference_api.py" in said
    assert "honoured" in said
    assert ("--torch_dtype" in said) == (resolve is transformers_server)


def test_mounted_weights_serve_without_any_flag(pod: Path) -> None:
    config = transformers_server([], {}, pod).config
    assert (config.model.path, config.served_name) == (pod / "workspace/weights", "weights")


def test_default_path_of_the_flag_is_the_mounted_weights(pod: Path) -> None:
    config = transformers_server(["--pretrained_model_name_or_path=/workspace/tfs/weights"], {}, pod).config
    assert config.model.path == pod / "workspace/weights"


def test_remote_files_must_be_allowed() -> None:
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


def test_chat_template_of_a_preset_is_found_at_the_path_in_kaitos_images(pod: Path) -> None:
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


def test_more_of_vllms_flags_are_carried_out(pod: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "adapters" / name for name in ("shop", "help")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    words = [
        "-tp", "2", "--gpu-memory-utilization=0.84", "--served-model-name", "phi-4", "phi",
        "--lora-modules", f"shop={folders[0]}", f'{{"name": "help", "path": "{folders[1]}"}}',
        "--tool-call-parser=xlam", "--enable-auto-tool-choice", "--port=5001",
    ]  # fmt: skip
    resolved = vllm_server(words, {}, pod)
    config = resolved.config
    assert (config.parallel, config.processes, config.port) == ("tp", 2, 5001)
    assert config.limits.gpu_memory_share == 0.84
    assert (config.served_name, config.served_aliases) == ("phi-4", ("phi",))
    assert [(each.name, each.reference) for each in config.adapters[1:]] == [
        ("shop", str(folders[0])),
        ("help", str(folders[1])),
    ]
    assert any("xlam" in warning for warning in resolved.warnings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pipeline-parallel-size=2"], "one node"),
        (["--max-modle-len=4096"], "did you mean 'max_model_len'"),
        (["phi-4"], "unexpected 'phi-4'"),
        (["-x", "2"], "unexpected '-x'"),
        (["--kaito-config-file=/mnt/config/missing.yaml"], "missing.yaml"),
        (["--lora-modules", "{}"], "expected name and path"),
        (["--api-key", "--enable-lora"], "--api-key: expected a value"),
        (["--served-model-name"], "--served-model-name: expected a value"),
        (["--served-model-name="], "--served-model-name: expected a value"),
        (["--max-num-seqs"], "--max-num-seqs: expected a value"),
        (["--model", "--max-num-seqs=4"], "--model: expected a value"),
        (["--model="], "--model: expected a value"),
        (["--enable-lora=maybe"], "--enable-lora is 'maybe', expected true or false"),
    ],
)
def test_vllm_flags_that_cannot_be_served_are_refused(words: list[str], message: str, pod: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        vllm_server(words, {}, pod)


def test_a_relative_config_file_lies_in_the_working_directory(
    pod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.yaml").write_text("vllm: {max-model-len: 256}\n")
    monkeypatch.chdir(tmp_path)
    config = vllm_server(["--kaito-config-file=here.yaml"], {}, pod).config
    assert config.limits.context_tokens == 256


def test_a_pod_for_prefill_alone_is_refused(pod: Path) -> None:
    with pytest.raises(ConfigError, match="KAITO_INFERENCE_ROLE is 'prefill'"):
        vllm_server([], {"KAITO_INFERENCE_ROLE": "prefill"}, pod)


def test_the_config_file_wins_over_the_command_as_in_kaitos_image(pod: Path) -> None:
    file = pod / "mnt/config/of-the-user.yaml"
    file.parent.mkdir()
    file.write_text(
        "max_probe_steps: 6\nkv_cache_cpu_memory_utilization: 0\nvllm:\n  max-model-len: 1024\n"
        "  served-model-name: [mine, also-mine]\n  cpu-offload-gb: 0\n  swap-space: 4\n"
    )
    words = ["--kaito-config-file=/mnt/config/of-the-user.yaml", "--max-model-len=auto", "--max-num-seqs=4"]
    resolved = vllm_server([*words, "--served-model-name=phi-4"], {}, pod)
    limits = resolved.config.limits
    assert (limits.context_tokens, limits.rows) == (1024, 4)
    assert (resolved.config.served_name, resolved.config.served_aliases) == ("mine", ("also-mine",))
    (warning,) = (w for w in resolved.warnings if "without effect" in w)
    assert "swap-space" in warning
    file.write_text("kv_cache_cpu_memory_utilization: 0.5\n")
    with pytest.raises(ConfigError, match="kv_cache_cpu_memory_utilization"):
        vllm_server(words, {}, pod)


def test_strength_is_the_variable_named_like_the_adapter(pod: Path) -> None:
    config = transformers_server([], {"my-lora.v2": "0.25"}, pod).config
    assert [(a.name, a.strength) for a in config.adapters] == [("my-lora.v2", 0.25)]


def test_requests_that_name_no_adapter_are_answered_as_by_each_runtime_of_kaito(pod: Path) -> None:
    """transformers: by all adapters together; vLLM: by the base model."""
    assert transformers_server([], {}, pod).config.combine_adapters
    assert not vllm_server([], {}, pod).config.combine_adapters


@pytest.mark.slow
def test_both_inference_apis_serve_and_drain(tiny_llama_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    commands = {
        "tfs": ["--pretrained_model_name_or_path", str(tiny_llama_dir), "--pipeline=text-generation"],
        "vllm": [f"--model={tiny_llama_dir}", "--served-model-name=tiny", f"--download-dir={tmp_path}"],
    }
    for runtime, flags in commands.items():
        log, base = tmp_path / f"{runtime}.log", f"http://127.0.0.1:{port}"
        command = [sys.executable, str(FILES / runtime / "inference_api.py"), *flags]
        with started(command, log, LOCAL_RANK=str(port - ports.CONTROLLER)) as process:
            assert answer(f"{base}/health", process, log).json() == {"status": "Healthy"}
            assert answer(f"{base}/healthz", process, log).json() == {"status": "Healthy"}
            body = {"prompt": "hello", "generate_kwargs": {"max_new_tokens": 4}}
            assert "Result" in httpx.post(f"{base}/chat", json=body, timeout=60).json()
            assert "Model loaded successfully" in log.read_text()
            if runtime == "vllm":
                assert httpx.get(f"{base}/v1/models").json()["data"][0]["id"] == "tiny"
                environ = {"BENCHMARK_DURATION_SEC": "2"}
                assert benchmark.run(environ, base=base, output=tmp_path / "report") == 0
                assert (
                    probes.node_health(["readiness", "--leader-address=127.0.0.1", f"--vllm-port={port}"])
                    == 0
                )
            process.terminate()
            assert process.wait(60) == 0, log.read_text()
    _, result = controller_reads((tmp_path / "report").read_text())
    assert result["vllm_total_tpm"] > 0
    assert result["ttft_avg_ms"] > 0


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit", "allow_remote_files"])
def test_word_that_is_neither_true_nor_false_is_refused(flag: str, pod: Path) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} is 'maybe', expected true or false"):
        transformers_server([*HEAD[:-2], f"--{flag}=maybe"], {}, pod)


def test_download_folder_that_cannot_be_written_is_named(pod: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        vllm_server([f"--download-dir={pod}"], {}, pod)
        assert not caplog.messages
        vllm_server([f"--download-dir={pod}/missing"], {}, pod)
    assert any("missing is missing or cannot be written by user" in line for line in caplog.messages)
