"""Adapters initialised from the base: what is saved fits the base as it was, LoftQ what 4 bits lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM

from runtime import adapters, models
from runtime.errors import ConfigError
from runtime.hardware import Hardware
from runtime.model_source import ModelSource, Quantization
from runtime.tuning.model import lora_init
from runtime.tuning.model.lora import attach, evaluating
from runtime.tuning.settings import Lora, TuningJob
from runtime.tuning.train.setup import training_attention
from tests.tuning.train.test_trainer import training_setup

Maker = Callable[..., TuningJob]

CPU = Hardware("cpu", "test", None, 8 << 30, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
        {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}},
    ],
    ids=["pissa", "pissa-rslora", "olora-patterns"],
)
def test_what_is_saved_of_weights_taken_from_the_base_is_an_update_of_the_whole_base(
    make_job: Maker, tiny_llama_dir: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    lora = Lora(r=4, alpha=8, options=options)
    setup = training_setup(
        make_job(
            training={"max_steps": 4, "learning_rate": 1e-2}, lora=lora, method="lora", quantization=None
        )
    )
    with training_attention(setup):
        setup.trainer.train()
    adapters.save(
        setup.model,
        tmp_path / "saved",
        source=ModelSource(name="tiny"),
        first_weights=setup.adapter.first_weights,
    )
    written = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    assert (written["r"], written["init_lora_weights"]) == (8, True)
    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        untrained = base(ids).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved"))(ids).logits
        with evaluating(setup.model):
            trained = setup.model(ids).logits
    assert (trained - untrained).abs().max() > 0.1
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)


def test_loftq_begins_with_what_four_bits_lost_and_leaves_the_base_alone(tiny_llama_dir: Path) -> None:
    source = ModelSource(name=str(tiny_llama_dir))
    base = models.load(source, hardware=CPU, device="cpu", quantization=Quantization(), training=True)
    packed = base.model.layers[1].mlp.up_proj.weight.data.clone()
    lora = Lora(r=8, alpha=16, options={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}})
    model = attach(base, lora)
    assert lora_init.initialise(model, lora, tiny_llama_dir) is None
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    weight = layer.get_base_layer().weight
    assert torch.equal(weight.data, packed)
    whole = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir)).model.layers[1].mlp.up_proj.weight
    lost = whole.detach() - dequantize_4bit(weight.data, weight.quant_state)
    update = layer.get_delta_weight("default")
    least = torch.linalg.svdvals(lost)[8:].square().sum().sqrt()
    assert (lost - update).norm() < 1.01 * least < 0.95 * lost.norm()


def test_loftq_learns(make_job: Maker) -> None:
    setup = training_setup(
        make_job(training={"max_steps": 12}, lora=Lora(options={"init_lora_weights": "loftq"}))
    )
    with training_attention(setup):
        setup.trainer.train()
    losses = [entry["loss"] for entry in setup.trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("options", "bits", "message"),
    [
        (
            {"init_lora_weights": "pissa"},
            4,
            "'pissa' changes the base weights, which are quantised: use method",
        ),
        ({"init_lora_weights": "olora"}, 8, "'olora' changes the base weights"),
        ({"init_lora_weights": "loftq"}, None, "'loftq' makes up for 4 bits"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}, 4, "'loftq' makes up for 4 bits"),
        ({"init_lora_weights": "eva"}, None, "is 'eva', expected true, false, gaussian"),
        (
            {"init_lora_weights": "pissa", "use_dora": True},
            None,
            "both use_dora and init_lora_weights 'pissa'",
        ),
        ({"use_dora": True}, 8, "use_dora does not go with load_in_8bit"),
    ],
)
def test_an_impossible_initialisation_is_one_line(
    options: dict[str, Any], bits: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_init.check(Lora(options=options), bits=bits)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "pissa_niter_16"])
def test_other_initialisations_pass(start: Any) -> None:
    lora_init.check(Lora(options={"init_lora_weights": start}), bits=None)
