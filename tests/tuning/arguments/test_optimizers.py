"""Every optimizer works with what is accepted for it, or is refused by its package's name."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import ConfigError
from runtime.tuning.arguments import optimizers, training
from runtime.tuning.arguments.optimizers import OPTIMIZERS

WHERE = {"where": "'optim'", "where_args": "'optim_args'"}

VALUES = {
    "ademamix": "beta1=0.8,beta2=0.99,beta3=0.999,alpha=4.0,eps=1e-6,t_alpha=10,t_beta3=20",
    "sgd": "momentum=0.9,nesterov=true",
    "adagrad": "lr_decay=0.1,eps=1e-6",
    "rmsprop": "momentum=0.5,alpha=0.9,eps=1e-6,centered=true",
}
"""Other than the optimizers' defaults."""

USABLE = [name for name, o in OPTIMIZERS.items() if not o.refused and not o.package]


def test_names_are_transformers_own() -> None:
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) == {name.value for name in OptimizerNames}


def made(name: str, optim_args: str | None, folder: Path, **given: Any) -> torch.optim.Optimizer:
    """Return the optimizer that Trainer would make."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(str(folder), optim=name, optim_args=optim_args, use_cpu=True, **given)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    return kind([torch.nn.Parameter(torch.zeros(4, 4))], **settings)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:Paged optimizers:UserWarning")
@pytest.mark.parametrize("name", USABLE)
def test_accepted_optimizer_steps_and_its_arguments_reach_it(name: str, tmp_path: Path) -> None:
    written = VALUES.get("ademamix" if "ademamix" in name else name)
    assert set(optimizers.parsed(written, "")) >= set(OPTIMIZERS[name].arguments) - {"dampening"}
    optimizers.check(name, written, **WHERE)
    optimizer = made(name, written, tmp_path)
    plain = made(name, None, tmp_path)
    if written:
        assert optimizer.defaults != plain.defaults
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:Paged optimizers:UserWarning")
@pytest.mark.parametrize("name", USABLE)
def test_adams_numbers_reach_the_optimizers_that_are_said_to_have_them(name: str, tmp_path: Path) -> None:
    changed = made(name, None, tmp_path, adam_beta1=0.5, adam_beta2=0.6)
    assert (changed.defaults != made(name, None, tmp_path).defaults) == OPTIMIZERS[name].adam


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("galore_adamw", "galore_torch"),
        ("apollo_adamw", "apollo_torch"),
        ("lomo", "lomo_optim"),
        ("schedule_free_adamw", "schedulefree"),
        ("adamw_anyprecision", "torchdistx"),
        ("adamw_torch_xla", "torch_xla"),
        ("grokadamw", "grokadamw is not installed"),
        ("stable_adamw", "torch-optimi is not installed"),
        ("adamw_torch_4bit", "torchao is not installed"),
    ],
)
def test_optimizer_that_cannot_be_used_is_named_with_its_package(name: str, package: str) -> None:
    with pytest.raises(ConfigError, match=package) as caught:
        optimizers.check(name, None, **WHERE)
    assert "adamw_torch" in str(caught.value)


def test_package_that_is_installed_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grokadamw.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    optimizers.check("grokadamw", "gamma=0.2", **WHERE)
    assert "grokadamw" not in sys.modules


@pytest.mark.parametrize(
    ("name", "written", "message"),
    [
        ("adamw_torch", "nonsense", "is 'nonsense', expected key=value,key=value"),
        ("adamw_torch", "momentum=0.9", "has 'momentum', but optim 'adamw_torch' takes none"),
        ("sgd", "momentun=0.9", "did you mean 'momentum'"),
        ("sgd", "weight_decay=0.1", "set the argument weight_decay"),
        ("sgd", "momentum=much", "'momentum' is 'much', expected a number"),
        ("sgd", "nesterov=true", "'nesterov' needs a 'momentum' above 0"),
        ("rmsprop_bnb", "alpha=0.9", "takes none"),
        ("ademamix", "beta1=2", "'beta1' is 2.0, expected a number of at least 0 and"),
    ],
)
def test_wrong_arguments_are_named(name: str, written: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        optimizers.check(name, written, **WHERE)


@pytest.mark.parametrize("written", ["adamw", "adamw_tor", "adamw_torch_npu", "galore", "lomoo"])
def test_a_misspelt_optimizer_is_answered_with_those_that_work(written: str) -> None:
    with pytest.raises(ConfigError) as refused:
        training.check({"optim": written}, "TrainingArguments")
    named = set(re.findall(r"[a-z0-9_]+", str(refused.value))) & optimizers.OPTIMIZERS.keys()
    assert named
    for name in named - {written}:
        optimizers.check(name, None, where="optim", where_args="optim_args")
