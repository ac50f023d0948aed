"""Tensor parallelism: two real ranks (gloo) answer as one process does; what cannot be divided is refused."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from runtime import adapters, families
from runtime.errors import ConfigError
from runtime.model_source import ModelSource
from runtime.serving.engine.engine import BatchingEngine, EngineLimits
from runtime.serving.engine.model_runner import Rank
from runtime.serving.engine.parallel import shard
from runtime.serving.engine.parallel.group import Group, rendezvous
from runtime.serving.engine.parallel.shard import Shard
from runtime.serving.engine.parallel.worker import WorkerTask, loaded_key
from tests.families import SIZES, TINY, config_of
from tests.serving.engine.calls import assert_scored, generate, load, make_request, run, score, scoring
from tests.serving.engine.models import some_prompts

DIVIDED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TINY if families.find(name).own_layers},
    "llama, biases": ("llama, biases", {}),
    "llama, one key-value head for both": ("llama", {"num_key_value_heads": 1}),
    "llama, tied and an odd vocabulary": ("llama", {"tie_word_embeddings": True, "vocab_size": 127}),
    "phi-4-mini, partial rotation": ("phi-4-mini, partial rotation", {}),
}
"""Name: family or variant, and what its configuration has instead."""
WORKER = """
import sys
from runtime.serving.engine.parallel.worker import WorkerTask, run
for line in sys.stdin:
    run(WorkerTask.model_validate_json(line))
"""
Divided = Callable[[Path], AbstractContextManager[BatchingEngine]]


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Divided]:
    """Opens an engine over a model directory, half of it here and half in one other process, kept for all."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, text=True)
    assert worker.stdin is not None

    @contextmanager
    def open_(folder: Path) -> Iterator[BatchingEngine]:
        file = tmp_path_factory.mktemp("rendezvous") / "file"
        task = WorkerTask(
            model=ModelSource(name="m", path=folder), rank=1, world=2, device="cpu", dtype="float32",
            threads=1, rendezvous=file,
        )  # fmt: skip
        assert worker.stdin is not None
        worker.stdin.write(task.model_dump_json() + "\n")
        worker.stdin.flush()
        config = transformers.AutoConfig.from_pretrained(str(folder))
        own_shard = Shard.of(config, 0, 2)
        model = shard.load(folder, config, own_shard, dtype=torch.float32, device="cpu")
        store = rendezvous(file, 2)
        store.wait([loaded_key(1)])
        group = Group(store, rank=0, world=2, device="cpu")
        group.all_reduce_min(1)
        engine = BatchingEngine(
            model,
            EngineLimits(max_sequences=4, context_tokens=400, max_waiting=8),
            rank=Rank(group, own_shard),
        )
        yield engine
        engine.close()
        group.close()

    yield open_
    worker.stdin.close()
    assert worker.wait(60) == 0


def save(family: str, folder: Path) -> Path:
    name, changed = DIVIDED[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, **changed))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("family", DIVIDED)
def test_two_ranks_answer_as_one_process(family: str, divided: Divided, tmp_path: Path) -> None:
    folder = save(family, tmp_path)
    prompts = some_prompts(3, 40, 1, 70, 300, vocabulary=120)
    expected = [generate(load(folder), prompt) for prompt in prompts]
    with divided(folder) as engine:
        cache = engine._runner.cache.keys[0]
        together = run(engine, *(make_request(prompt, id=str(n)) for n, prompt in enumerate(prompts)))
        again = run(engine, make_request(prompts[4]))
    assert [ids for ids, _ in together] == expected
    assert again[0][0] == expected[4], "read from the cache on every rank"
    whole = AutoModelForCausalLM.from_pretrained(str(folder)).config.num_key_value_heads
    assert cache.shape[1] == max(1, whole // 2)
    assert len({token for ids in expected for token in ids}) > 8, "the model repeats itself: proves nothing"


def test_two_ranks_score_a_prompt_as_one_process(divided: Divided, tmp_path: Path) -> None:
    folder = save("llama, tied and an odd vocabulary", tmp_path)
    prompts = some_prompts(3, 90, vocabulary=120)
    with divided(folder) as engine:
        answers = score(engine, *(scoring(prompt, id=str(n)) for n, prompt in enumerate(prompts)))
    for tokens, prompt in zip(answers, prompts, strict=True):
        assert_scored(tokens, prompt, load(folder))


@pytest.mark.parametrize("family", ["llama, biases", "phi3"])
def test_adapters_are_divided_like_the_layers_they_adapt(
    family: str, divided: Divided, tmp_path: Path
) -> None:
    folder = save(family, tmp_path / "model")
    tuned = get_peft_model(load(folder), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    good, bad = tmp_path / "good", tmp_path / "bad"
    adapters.save(tuned, good, source=ModelSource(name="m", repository="someone/m"))
    (prompt,) = some_prompts(9)
    base = generate(load(folder), prompt)
    expected = generate(PeftModel.from_pretrained(load(folder), str(good)), prompt)
    assert base != expected
    adapters.save(tuned, bad, source=ModelSource(name="m", repository="someone/m"))
    weights = load_file(str(bad / "adapter_model.safetensors"))
    wide = {name: torch.cat((value, value), -1) for name, value in weights.items() if "lora_A" in name}
    save_file(weights | wide, str(bad / "adapter_model.safetensors"))
    with divided(folder) as engine:
        with pytest.raises(ConfigError, match="adapter bad: does not fit this model"):
            engine.add_adapter("bad", bad)
        engine.add_adapter("good", good)
        with_and_without = run(engine, make_request(prompt, adapter="good"), make_request(prompt, id="2"))
        engine.remove_adapter("good")
        engine.add_adapter("weak", good, strength=0.0)
        weak = run(engine, make_request(prompt, adapter="weak"))
    assert [ids for ids, _ in with_and_without] == [expected, base]
    assert weak[0][0] == base


def test_a_rank_holds_its_shard_and_nothing_else(tmp_path: Path) -> None:
    folder = save("phi3", tmp_path)
    whole = load(folder)
    config = copy.deepcopy(whole.config)
    halves = [
        shard.load(folder, config, Shard.of(config, rank, 2), dtype=torch.float32, device="cpu")
        for rank in range(2)
    ]
    divided = sum(
        parameter.numel() for name, parameter in whole.named_parameters() if name.endswith("proj.weight")
    )
    rest = sum(parameter.numel() for parameter in whole.parameters()) - divided
    for half in halves:
        assert sum(parameter.numel() for parameter in half.parameters()) == divided // 2 + rest
    up = [half.model.layers[0].mlp.gate_up_proj.weight.chunk(2)[1] for half in halves]
    assert torch.equal(torch.cat(up), whole.model.layers[0].mlp.gate_up_proj.weight.chunk(2)[1])


@pytest.mark.parametrize(
    ("kind", "options", "world", "reason"),
    [
        ("LlamaConfig", {}, 3, "4 attention heads cannot be divided among 3 processes"),
        ("LlamaConfig", {"intermediate_size": 97}, 2, "97 inner features cannot be divided among 2"),
        (
            "LlamaConfig",
            {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6},
            4,
            "6 key-value heads can neither be divided among 4 processes nor held by equally many",
        ),
        ("FalconConfig", {}, 2, "does not know architecture 'falcon', but gemma, llama"),
        (
            "LlamaConfig",
            {"quantization_config": {"quant_method": "awq"}},
            2,
            "divides whole weights, and this model's are quantised",
        ),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            2,
            "rope type 'proportional' is not one it knows",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(
    kind: str, options: dict[str, Any], world: int, reason: str
) -> None:
    config = getattr(transformers, kind)(**SIZES | options)
    with pytest.raises(ConfigError, match=reason):
        Shard.of(config, 0, world)


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = save("qwen3", tmp_path)
    file = folder / "model.safetensors"
    weights = load_file(str(file))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, str(file))
    config = transformers.AutoConfig.from_pretrained(str(folder))
    with pytest.raises(ConfigError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        shard.load(folder, config, Shard.of(config, 0, 2), dtype=torch.float32, device="cpu")
