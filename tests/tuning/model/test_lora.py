"""The QLoRA step against a dequantised float32 reference; targets; evaluation mode."""

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM

from runtime import models
from runtime.errors import ConfigError
from runtime.hardware import Hardware
from runtime.model_source import ModelSource, Quantization
from runtime.tuning.data.batching import IGNORE, collate
from runtime.tuning.loss import HeldOutRows, batch_loss, mean_loss
from runtime.tuning.model import packed_attention
from runtime.tuning.model.lora import attach, evaluating, resolve_targets
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import Lora
from tests.families import config_of
from tests.tuning.tiny_models import some_rows

CPU = Hardware("cpu", "test", None, 8 << 30, 1)


def quantised(folder: Path, lora: Lora) -> PeftModel:
    source = ModelSource(name="tiny", path=folder)
    base = models.load(source, hardware=CPU, device="cpu", quantization=Quantization(), training=True)
    torch.manual_seed(1)
    return attach(base, lora)


def dequantised(model: PeftModel) -> Any:
    """Return a float32 copy of `model` whose 4-bit layers are plain linear ones with the same values."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            twin.set_submodule(name, plain)
    return twin


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def move_adapter(model: PeftModel) -> None:
    """Give the adapter's B matrices values: at zero, A would have no gradient."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)


def test_gradients_equal_the_dequantised_reference_also_after_an_evaluation(tiny_llama_dir: Path) -> None:
    model = quantised(tiny_llama_dir, Lora(r=4, alpha=8))
    move_adapter(model)
    reference = dequantised(model)
    rows = some_rows(5)
    # On a CPU with AVX512-BF16 a plain evaluation would repack the weights for a kernel without gradients.
    mean_loss(model, HeldOutRows(rows, "sorted", 400), Ranks())
    losses = []
    for each in (model, reference):
        each.train()
        loss = batch_loss(each, collate(rows, "sorted", pad_id=0), "cpu")
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    expected = gradients(reference)
    assert gradients(model).keys() == expected.keys()
    assert len(expected) == 2 * 2 * 7  # A and B, two layers, seven linears
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_one_step_equals_plain_peft_and_transformers(tiny_llama_dir: Path) -> None:
    ours = quantised(tiny_llama_dir, Lora(r=4, alpha=8))
    source = ModelSource(name="tiny", path=tiny_llama_dir)
    base = models.load(source, hardware=CPU, device="cpu", quantization=Quantization(), training=True)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        theirs = get_peft_model(base, config)
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    rows = some_rows(3)
    packed_attention.register()
    ours.get_base_model().set_attn_implementation(packed_attention.NAME)
    ours.train()
    theirs.train()
    batch = collate(rows, "packed", pad_id=0)
    mine = float(batch_loss(ours, batch, "cpu").detach()) / int((batch.labels != IGNORE).sum())
    padded = collate(rows, "sorted", pad_id=0)
    labels = torch.full_like(padded.inputs["input_ids"], IGNORE)
    labels[:, padded.logits_to_keep + 1] = padded.labels
    plain = float(theirs(**padded.inputs, labels=labels, use_cache=False).loss.detach())
    assert mine == pytest.approx(plain, rel=1e-6)


def test_adapter_weights_are_float32_whatever_the_base_is(tiny_llama_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir), dtype=torch.bfloat16)
    model = attach(base, Lora(r=2, alpha=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in base.model.embed_tokens.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) if isinstance(options, dict) else None,
)
def test_peft_variants_attach(tiny_llama_dir: Path, options: dict[str, Any]) -> None:
    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    model = attach(base, Lora(r=2, alpha=2, options=options))
    batch_loss(model, collate(some_rows(2), "sorted", pad_id=0), "cpu").backward()
    assert gradients(model)


def test_unknown_lora_option_is_one_readable_line(tiny_llama_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    with pytest.raises(ConfigError, match=r"LoraConfig does not fit this model: .*use_rslorra"):
        attach(base, Lora(options={"use_rslorra": True}))


def test_split_names_become_the_fused_ones_of_phi3() -> None:
    wanted = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    fused = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert set(resolve_targets(wanted, fused)) == fused
    assert resolve_targets(wanted, wanted) == tuple(wanted)


def test_target_that_matches_nothing_names_what_is_there() -> None:
    with pytest.raises(ConfigError, match=r"no linear layer 'q_prj' in this model \(did you mean 'q_proj'"):
        resolve_targets(["q_prj"], {"q_proj", "v_proj"})


def test_evaluation_restores_the_mode(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir)).train()
    with evaluating(model):
        assert not model.training
    assert model.training


@pytest.mark.parametrize(
    ("targets", "options", "expected"),
    [
        (("layers.99.self_attn.q_proj", "v_proj"), {}, "target_modules: 'layers.99.self_attn.q_proj'"),
        (("q_proj",), {"rank_pattern": {"v_proj": 8}}, "rank_pattern: 'v_proj'"),
        (("q_proj",), {"alpha_pattern": {r"layers\.7\..*": 8}}, "alpha_pattern: "),
        (("q_proj",), {"exclude_modules": ["no_proj"]}, "exclude_modules: 'no_proj'"),
        (("q_proj",), {"layers_to_transform": [0, 7]}, "layers_to_transform: 7"),
        (("q_proj",), {"rank_pattern": {"(": 8}}, r"rank_pattern: '\(' is no regular expression"),
    ],
)
def test_what_reaches_no_module_is_refused_by_name(
    tiny_llama_dir: Path, targets: tuple[str, ...], options: dict[str, Any], expected: str
) -> None:
    """peft passes over it, and the adapter lacks what was asked for."""
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    with pytest.raises(ConfigError, match=expected):
        attach(model, Lora(r=4, targets=targets, options=options))


def test_names_patterns_and_layers_that_reach_modules_are_taken(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    options = {
        "rank_pattern": {r"layers\.0\..*q_proj": 2},
        "exclude_modules": ["mlp.up_proj"],
        "layers_to_transform": 0,
    }
    adapted = attach(model, Lora(r=4, targets=("self_attn.q_proj", "up_proj"), options=options))
    trained = {name: weight.shape[0] for name, weight in adapted.named_parameters() if "lora_A" in name}
    assert trained == {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["classifier"]}, "no module 'classifier' in this model"),
        ({"modules_to_save": ["o_proj"]}, "'o_proj' is quantised and cannot be trained whole"),
        ({"target_parameters": ["layers.0.mlp.gate_proj.weight"]}, "is quantised"),
        ({"target_parameters": ["nothing.weight"]}, "is no parameter of this model"),
        ({"trainable_token_indices": [1_000_000]}, "1000000 is no token; the vocabulary has"),
    ],
)
def test_what_the_model_has_not_or_cannot_train_is_named(
    options: dict[str, Any], message: str, tiny_llama_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantised(tiny_llama_dir, Lora(r=4, options=options))


def test_layers_are_chosen_among_all_linear_ones(tiny_llama_dir: Path) -> None:
    model = quantised(tiny_llama_dir, Lora(r=4, options={"layers_to_transform": 0}))
    adapted = {name for name in get_peft_model_state_dict(model) if "lora_A" in name}
    assert len(adapted) == 7
    assert all(".layers.0." in name for name in adapted)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_have_the_gradients_of_peft(bias: str) -> None:
    config = config_of("qwen2")
    base = AutoModelForCausalLM.from_config(config)
    ours = attach(base, Lora(r=4, options={"bias": bias}))
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        module.__dict__.pop("forward", None)
    batch = collate(some_rows(2), "sorted", pad_id=0)
    found = []
    for model in (ours, theirs):
        move_adapter(model)
        model.train()
        batch_loss(model, batch, "cpu").backward()
        found.append(gradients(model))
    assert any(name.endswith("bias") for name in found[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-5)
