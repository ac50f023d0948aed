"""The table of vLLM's flags: complete, and each flag honoured, harmless or refused as it says."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from runtime.config import flatten
from runtime.errors import ConfigError
from runtime.pod.inference import TRANSFORMERS_FLAGS
from runtime.serving.settings import ServeConfig
from runtime.workspace import vllm_flags
from runtime.workspace.layers import LayeredSettings

DOCS = Path(__file__).parents[2] / "docs/kaito.md"


def applied(flags: dict[str, Any]) -> tuple[dict[str, Any], LayeredSettings]:
    settings = LayeredSettings()
    vllm_flags.apply(settings, flags)
    return flatten(settings.values), settings


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"max-model-len": "auto"}, {}),
        ({"max_model_len": -1}, {}),
        ({"max_model_len": "4096"}, {"limits.context_tokens": 4096}),
        ({"max_model_len": "32k"}, {"limits.context_tokens": 32000}),
        ({"max_model_len": "1.5K"}, {"limits.context_tokens": 1536}),
        ({"max_num_seqs": 8}, {"limits.rows": 8}),
        ({"max_lora_rank": "32"}, {"max_lora_rank": 32}),
        ({"adapter_source": ["r.io/a", "r.io/b"]}, {"adapter_sources": ("r.io/a", "r.io/b")}),
        ({"adapter-cache": "/c", "max-adapters": 8}, {"adapter_cache": "/c", "adapter_limits.resident": 8}),
        ({"gpu_memory_utilization": "0.84"}, {"limits.gpu_memory_share": 0.84}),
        ({"tensor_parallel_size": "1"}, {}),
        ({"tensor_parallel_size": "4"}, {"processes": 4, "parallel": "tp"}),
        ({"data_parallel_size": "2"}, {"replicas": 2}),
        ({"dtype": "half"}, {"model.dtype": "float16"}),
        ({"dtype": "bfloat16"}, {}),
        ({"quantization": "bitsandbytes"}, {"quantization.bits": 4}),
        ({"quantization": None} | {"quantization": "None"}, {}),
        ({"served_model_name": "a"}, {"served_name": "a", "served_aliases": ()}),
        ({"served_model_name": ["a", "b"]}, {"served_name": "a", "served_aliases": ("b",)}),
        ({"revision": "main"}, {}),
        ({"revision": "abc", "code_revision": "def"}, {"model.revision": "abc"}),
        ({"code_revision": "def"}, {"model.revision": "def"}),
        ({"host": "127.0.0.1", "port": 5001}, {"host": "127.0.0.1", "port": 5001}),
        ({"allowed_origins": '["https://a.example"]'}, {"allowed_origins": ("https://a.example",)}),
        ({"allowed_origins": ["*"]}, {"allowed_origins": ("*",)}),
        ({"allowed_origins": "[]"}, {}),
        ({"tool_call_parser": "hermes"}, {"tool_call_parser": "hermes"}),
    ],
)  # fmt: skip
def test_honoured_flags_become_settings(flags: dict[str, Any], expected: dict[str, Any]) -> None:
    values, settings = applied(flags)
    assert values == expected
    assert not settings.warnings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pipeline-parallel-size": "2"}, "one node: set resource.count to 1"),
        ({"distributed_executor_backend": "ray"}, "without Ray"),
        ({"allowed_origins": "[x"}, "list in JSON"),
        ({"allow_credentials": None}, "stored password"),
        ({"allowed_methods": '["GET"]'}, "every method and header"),
        ({"kaito_kv_cache_cpu_memory_utilization": "0.5"}, "set it to 0"),
        ({"cpu-offload-gb": 4}, "set it to 0"),
        ({"kv_transfer_config": '{"kv_connector": "NixlConnector"}'}, "prefill and decode run in one server"),
        ({"override_generation_config": '{"temperature": 0}'}, "it changes answers"),
        ({"load_format": "runai_streamer"}, "safetensors"),
        ({"quantization": "fp8"}, "expected bitsandbytes"),
        ({"max_modle_len": "4096"}, "unknown flag .did you mean 'max_model_len'"),
        ({"max_model_len": "much"}, "expected a number of tokens"),
        ({"max_num_seqs": "0"}, "expected a whole number of at least 1"),
        ({"gpu_memory_utilization": "84"}, "above 0, and 1 at most"),
        ({"dtype": "int8"}, "expected auto, bfloat16"),
    ],
)
def test_refused_flags_and_wrong_values_are_named(flags: dict[str, Any], message: str) -> None:
    (flag,) = flags
    with pytest.raises(ConfigError, match=message) as caught:
        applied(flags)
    assert f"--{flag.replace('_', '-')}" in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        {"pipeline-parallel-size": "1"},
        {"kaito_kv_cache_cpu_memory_utilization": "0"},
        {"cpu_offload_gb": 0},
        {"generation_config": "auto"},
        {"load_format": "auto"},
        {"no_skip_tokenizer_init": None},
    ],
)
def test_a_refused_flag_passes_where_it_asks_for_nothing(flags: dict[str, Any]) -> None:
    values, settings = applied(flags)
    assert not values
    assert not settings.warnings


def test_harmless_flags_are_named_with_the_reason() -> None:
    flags = {
        "kv-events-config": '{"enable_kv_cache_events": true}',
        "compilation-config.pass_config.fuse_allreduce_rms": "False",
        "no-enable-prefix-caching": None,
        "swap_space": 4,
    }
    found = vllm_flags.apply(LayeredSettings(), flags).harmless
    assert [phrase.partition(": ")[0] for phrase in found] == [
        "kv-events-config", "compilation-config.pass_config.fuse_allreduce_rms",
        "no-enable-prefix-caching, swap_space",
    ]  # fmt: skip


def test_adapters_that_are_switched_off_are_a_warning() -> None:
    assert not applied({"enable_lora": None})[1].warnings
    (warning,) = applied({"no-enable-lora": None})[1].warnings
    assert "served all the same" in warning


@pytest.mark.parametrize("flag", ["tool_call_parser", "reasoning_parser"])
def test_a_parser_that_is_not_known_is_a_warning(flag: str) -> None:
    _, settings = applied({flag: "somebodys"})
    (warning,) = settings.warnings
    assert "somebodys: this format" in warning
    assert "mistral" in warning
    assert not applied({flag: "mistral"})[1].warnings


def test_every_honoured_setting_exists() -> None:
    """A renamed setting would otherwise show only in a pod."""
    values = {
        "max_model_len": "64", "max_num_seqs": 1, "gpu_memory_utilization": 1, "tensor_parallel_size": 2,
        "data_parallel_size": 2, "dtype": "half", "quantization": "bitsandbytes",
        "served_model_name": ["a", "b"], "shutdown_timeout": 5,
        "revision": "r", "host": "127.0.0.1", "port": 1, "api_key": "k", "tool_call_parser": "hermes",
        "reasoning_parser": "qwen3", "allowed_origins": ["*"],
    }  # fmt: skip
    _, settings = applied(values)
    settings.put("model.name", "m", "test")
    settings.build(ServeConfig, "test")


def test_every_flag_stands_in_one_rule_and_its_treatment_is_one_of_three() -> None:
    tables = tomllib.loads(vllm_flags.TABLE.read_text())["rule"]
    names = [name for table in tables for name in table["flags"].split()]
    assert len(names) == len(set(names))
    assert {table["treatment"] for table in tables} == {"honoured", "harmless", "refused"}


def test_every_flag_of_vllm_has_a_rule() -> None:
    """The list holds the flags of vLLM 0.25.1's `serve`, which KAITO's image of v0.12 runs."""
    flags = (Path(__file__).parent / "vllm-0.25.1-flags.txt").read_text().split()
    assert len(flags) == 270
    assert set(flags) - vllm_flags.rules().keys() == set()


def test_the_page_shows_the_tables() -> None:
    page = DOCS.read_text()
    for flag, treatment, why in (*vllm_flags.table(), *vllm_flags.table(TRANSFORMERS_FLAGS)):
        assert f"| `{flag}` | {treatment} | {why} |" in page


@pytest.mark.parametrize(
    ("flag", "value"),
    [("hf_token", "Zq8vN2tLw0Kx"), ("additional_config", '{"password": "Zq8vN2tLw0Kx"}')],
)
def test_a_value_that_may_hold_a_secret_is_not_shown(flag: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        applied({flag: value})
    assert "Zq8vN2tLw0Kx" not in str(caught.value)
    assert f"--{flag.replace('_', '-')} is not served here" in str(caught.value)
