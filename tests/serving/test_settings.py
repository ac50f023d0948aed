"""Settings of a server that do not go together."""

from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.serving.settings import ServeConfig, check


def config(**given: Any) -> ServeConfig:
    return ServeConfig.model_validate({"model": {"name": "m"}, "served_name": "m", **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter_root": "/x"}, "adapter_root needs an API key"),
        ({"engine": "vllm", "quantization": {"bits": 8}}, "nf4 only"),
        ({"parallel": "tp", "processes": 2, "quantization": {"bits": 4}}, "divides whole weights"),
        (
            {"parallel": "tp", "replicas": 2},
            "replicas is 2 and parallel tp: a copy of the model is not divided",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config(**given))


@pytest.mark.parametrize(
    "given",
    [
        {"adapter_root": "/x", "api_key": "k"},
        {"engine": "vllm", "quantization": {"bits": 4}, "parallel": "tp", "processes": 4},
        {"quantization": {"bits": 8}, "parallel": "tp", "processes": 1},
        {"parallel": "tp"},
        {"engine": "vllm", "parallel": "tp", "replicas": 2},
    ],
)
def test_others_are_taken(given: dict[str, Any]) -> None:
    check(config(**given))
