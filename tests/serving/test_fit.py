"""How a server is laid over the GPUs of one machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from runtime import gpus
from runtime.errors import ConfigError
from runtime.hardware import Hardware
from runtime.memory import shape
from runtime.serving import fit
from runtime.serving.engine.parallel.shard import Shard
from runtime.serving.settings import ServeConfig
from runtime.workspace import load_server

CPU = Hardware("cpu", "CPU", None, 64 << 30, 1)


def config(model: str, **settings: Any) -> ServeConfig:
    return load_server(model, environ={}, overrides=settings).config


def laid_out(model: str, gpu: str | Hardware, **settings: Any) -> fit.ServerLayout:
    server = config(model, **settings)
    machine = gpu if isinstance(gpu, Hardware) else gpus.named(gpu).hardware
    return fit.lay_out(server, machine, shape.of(server.model))


@pytest.mark.parametrize(
    ("gpu", "settings", "servers", "processes", "copies"),
    [
        ("A100-80GB", {}, 1, 1, 1),
        ("8x A100-80GB", {}, 8, 1, 1),
        ("8x A100-80GB", {"parallel": "tp"}, 1, 8, 1),
        ("8x A100-80GB", {"parallel": "tp", "processes": 2}, 4, 2, 1),
        ("8x A100-80GB", {"replicas": 3}, 2, 1, 3),
        ("4x T4-16GB", {}, 2, 2, 1),  # one does not hold 16 GB of weights
        ("4x A100-80GB", {"engine": "vllm", "vllm.flags": {"tensor-parallel-size": 4}}, 1, 4, 1),
    ],
)
def test_gpus_of_a_server_are_those_that_are_asked_for_or_the_fewest_that_hold_it(
    gpu: str, settings: dict[str, Any], servers: int, processes: int, copies: int
) -> None:
    layout = laid_out("llama-3.1-8b-instruct", gpu, **settings)
    assert (layout.servers, layout.run.processes, layout.run.copies) == (servers, processes, copies)
    assert layout.fits


@pytest.mark.parametrize(
    ("gpu", "settings", "message"),
    [
        (
            "A100-80GB",
            {"parallel": "tp", "processes": 2},
            "processes is 2, each on a GPU .*, and a node has 1",
        ),
        ("2x A100-80GB", {"replicas": 3}, "replicas is 3, each on a GPU .*, and a node has 2"),
        ("3x A100-80GB", {"parallel": "tp"}, "32 attention heads cannot be divided among 3 GPUs"),
        ("2x A100-80GB", {"parallel": "tp", "quantization.bits": 4}, "quantised weights cannot be divided"),
    ],
)
def test_what_the_machine_cannot_do_is_refused(gpu: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        laid_out("llama-3.1-8b-instruct", gpu, **settings)


def test_more_gpus_are_taken_for_the_context_that_is_asked_for() -> None:
    model, gpu = "llama-3.1-8b-instruct", "4x L4-24GB"
    assert laid_out(model, gpu).run.processes == 1
    layout = laid_out(model, gpu, **{"limits.context_tokens": 100_000})
    assert layout.run.processes == 2
    assert layout.capacity.context_tokens == 100_000


def test_share_of_the_memory_bounds_the_cache() -> None:
    whole = laid_out("phi-4", "A100-80GB").capacity
    half = laid_out("phi-4", "A100-80GB", **{"limits.gpu_memory_share": 0.5}).capacity
    assert whole.available_bytes - half.available_bytes == pytest.approx(40 << 30, rel=0.01)
    assert not laid_out("phi-4", "A100-80GB", **{"limits.gpu_memory_share": 0.3}).fits


def test_copies_share_the_memory_of_a_cpu() -> None:
    one, two = (laid_out("smollm2-135m-instruct", CPU, replicas=count).capacity for count in (1, 2))
    assert two.available_bytes == one.available_bytes // 2
    assert not laid_out("phi-4-mini-instruct", CPU, replicas=4).fits
    assert laid_out("phi-4-mini-instruct", CPU).fits


def test_context_beyond_the_model_or_the_memory_is_said() -> None:
    long = config("phi-4", **{"limits.context_tokens": 99_999})
    model = shape.of(long.model)
    (warning,) = fit.warnings(fit.lay_out(long, gpus.of_kind("A100-80GB"), model), long, model)
    assert warning == "limits.context_tokens is 99999, but phi-4 was made for 16384: so many are served"
    wide = config("phi-4", **{"limits.context_tokens": 16_384})
    (warning,) = fit.warnings(fit.lay_out(wide, gpus.of_kind("V100-32GB"), model), wide, model)
    assert warning.startswith("memory allows requests of ")
    fits = config("phi-4")
    assert list(fit.warnings(fit.lay_out(fits, gpus.of_kind("A100-80GB"), model), fits, model)) == []


@pytest.mark.parametrize("world", [2, 4, 8])
def test_shard_is_counted_as_the_engine_divides_the_model(world: int, tmp_path: Path) -> None:
    described = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(described))
    whole = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        part = AutoModelForCausalLM.from_config(Shard.of(whole, 0, world).config(whole))
    planned = shape.read(tmp_path / "config.json", name="tiny").shard(world)
    assert planned.parameters == sum(each.numel() for each in part.parameters())
    assert planned.cache.token == 2 * 2 * max(1, 4 // world) * 32
