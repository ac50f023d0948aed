"""The formulas, held to what autograd keeps in transformers' layers with peft's adapters."""

from pathlib import Path
from typing import Any

import pytest

from runtime import families
from runtime.adapters import LoraFields
from runtime.memory import shape, tuning
from runtime.memory.shape import Shape
from runtime.memory.tuning import TuningRun
from runtime.presets import Dimensions, source
from tests.families import config_of

TOKENS, RANK = 256, 8
SIZE = {"hidden": 96, "heads": 6, "kv_heads": 2, "head_dim": 16, "intermediate": 200, "vocabulary": 128}
MEASURED: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "phi3": {"sliding_window": None}, "phi": {},
    "falcon, one key-value head": {"bias": False},
}  # fmt: skip
NAMES = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 6}


def kept(kind: str, layers: int, *, packed: bool, dtype: str) -> int:
    """Return the bytes that autograd keeps for the backward pass of TOKENS tokens in two documents."""
    import torch
    import transformers

    from runtime.tuning.model import adapter_matrices, fused_lora, lora, packed_attention
    from runtime.tuning.settings import Lora

    config = config_of(kind, **NAMES | MEASURED[kind], num_hidden_layers=layers)
    base = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    adapted = lora.attach(base, Lora(r=RANK))
    adapted.train()
    ids = torch.zeros(2, TOKENS // 2, dtype=torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if packed:
        packed_attention.register()
        adapted.get_base_model().set_attn_implementation(packed_attention.NAME)
        positions = torch.arange(TOKENS // 2).repeat(2)[None]
        inputs = {"input_ids": ids.view(1, -1), "position_ids": positions}
        lengths = (TOKENS // 2, TOKENS // 2)
        inputs["documents"] = packed_attention.Documents(lengths, packed_attention.borders(lengths))
    else:
        inputs["attention_mask"][0, -3:] = 0
    groups = fused_lora.adapter_groups(adapted)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}
    seen: dict[int, int] = {}
    alive = []

    def keep(tensor: Any) -> Any:
        alive.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    with (
        adapter_matrices.held(groups, getattr(torch, dtype)),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        half,
    ):
        matrices = [each for group in groups if group.held for each in (group.held.a, *group.held.bs)]
        parameters |= {matrix.untyped_storage().data_ptr() for matrix in matrices}
        adapted(**inputs, use_cache=False, logits_to_keep=torch.tensor([0]))
    return sum(seen.values())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "sorted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MEASURED)
def test_activations_are_what_autograd_keeps(kind: str, dtype: Any, packed: bool) -> None:
    model_type = config_of(kind).model_type
    if packed and not families.find(model_type).packed:
        pytest.skip(f"{model_type} is never packed")
    size = Dimensions(**(SIZE | {"kv_heads": 1} if model_type == "falcon" else SIZE), layers=1)
    run = TuningRun(TOKENS, TOKENS // 2, dtype, "cpu", bits=None, rank=RANK, packed=packed)
    one = tuning.layer_bytes(Shape(kind, model_type, size, 2048, 0), run)
    measured = kept(kind, 2, packed=packed, dtype=dtype) - kept(kind, 1, packed=packed, dtype=dtype)
    assert one == pytest.approx(measured, rel=0.12 if model_type == "falcon" else 0.03)


def part(parts: tuple[tuning.MemoryItem, ...], name: str) -> int:
    return next(part.size_bytes for part in parts if part.name == name)


def test_phi_3_mini_in_four_bits_is_as_its_formulas_say() -> None:
    """The figures of an independent estimate: 0.516 bytes a weight, 16 a trained one, and 2 of its copy."""
    phi = shape.of(source("phi-3-mini-128k-instruct"))
    run = TuningRun(2048, 2048, "float16", "cuda", checkpointing=True)
    parts = tuning.parts(phi, run)
    base = part(parts, "base weights") + part(parts, "quantisation constants")
    assert base == pytest.approx(0.516 * 3.62e9, rel=0.005)
    assert tuning.trained(phi, run) == 32 * 16 * (3072 * 3 + 9216 + 3072 + 16384 + 8192 + 3072)
    states = part(parts, "LoRA weights") + part(parts, "gradients") + part(parts, "optimizer state")
    assert states == tuning.trained(phi, run) * 18
    assert part(parts, "layer inputs (checkpointing)") == 2048 * 32 * 3072 * 2
    assert 3.9 < tuning.total(parts) / 2**30 < 5.0


@pytest.mark.parametrize(
    ("change", "smaller"),
    [
        ({"optimizer": "paged_adamw_8bit"}, "optimizer state"),
        ({"rank": 4}, "gradients"),
        ({"labelled_share": 0.4}, "logits"),
        ({"shards": 2}, "base weights"),
        ({"targets": ("o_proj", "gate_up_proj", "down_proj")}, "LoRA weights"),
    ],
)
def test_each_setting_lowers_its_part(change: dict[str, Any], smaller: str) -> None:
    from dataclasses import replace

    phi, run = shape.of(source("phi-3-mini-128k-instruct")), TuningRun(2048, 2048, "float16", "cuda")
    before, after = tuning.parts(phi, run), tuning.parts(phi, replace(run, **change))
    assert part(after, smaller) < part(before, smaller)
    assert tuning.total(after) < tuning.total(before)


def test_every_optimizer_of_the_arguments_has_a_state_size() -> None:
    assert tuning.state_bytes("adamw_torch") == 8
    assert tuning.state_bytes("adamw_8bit") == pytest.approx(2, rel=0.02)
    assert tuning.state_bytes("paged_lion_8bit") == pytest.approx(1, rel=0.02)
    assert tuning.state_bytes("lion_32bit") == 4
    assert tuning.state_bytes("sgd") == 0


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {r"layers\.0\..*q_proj": 32, "dense": 2}},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["down_proj", "dense_4h_to_h", "fc2"]},
        {"target_modules": r".*\.1\..*(q_proj|qkv_proj|query_key_value)"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.parametrize("name", ["llama", "phi3", "phi", "falcon", "gpt_neox", "opt"])
def test_weights_of_an_adapter_with_patterns_are_pefts(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The paths of modules too: each family has its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    configuration = config_of(name)
    configuration.save_pretrained(str(tmp_path))
    read = shape.read(tmp_path / "config.json", name="m")
    given = {"r": 4, "target_modules": sorted({each.name for each in read.linears})} | options
    with torch.device("meta"):
        adapted = get_peft_model(AutoModelForCausalLM.from_config(configuration), LoraConfig(**given))
    expected = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert tuning.patterned(read, LoraFields.model_validate(given)) == expected > 0
