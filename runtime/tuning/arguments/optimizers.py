"""The optimizers: the package that each needs, the `optim_args` that it takes, those that cannot be used.

A copy of what transformers' handlers read (tests try each). Packages are looked for, not imported. Does not
know files. Start at `check`.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.config import nearest
from runtime.errors import ConfigError
from runtime.tuning.arguments.kinds import Range


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One optimizer."""

    package: str = ""
    """What it needs beside torch and bitsandbytes, as Python imports it."""
    adam: bool = True
    """Whether `adam_beta1`, `adam_beta2` and `adam_epsilon` have an effect."""
    arguments: Mapping[str, Range] = field(default_factory=dict)
    """Keys of `optim_args`."""
    refused: str = ""
    """Why it cannot be used."""


_POSITIVE = Range(above=True)
_BETA = Range(most=1.0, below=True)
_WHOLE = Range("int", 1)
_BOOL = Range("true|false|True|False")
_ADEMAMIX = Optimizer(
    arguments={
        **dict.fromkeys(("beta1", "beta2", "beta3"), _BETA),
        "alpha": Range(),
        "eps": _POSITIVE,
        "t_alpha": _WHOLE,
        "t_beta3": _WHOLE,
    }
)
_ONLY_TRUE = Range("true")
"""transformers takes any word for true."""
_GALORE = Optimizer(
    "galore_torch",
    refused="it makes the gradients of whole weights low-rank, and those of an adapter are low-rank already",
)
_APOLLO = Optimizer("apollo_torch", refused=_GALORE.refused)
_LOMO = Optimizer(
    "lomo_optim", refused="it changes weights within the backward pass, before a step is complete and checked"
)
_SCHEDULE_FREE = Optimizer(
    "schedulefree",
    refused="it trains and evaluates with different weights, and checkpoints here hold one kind",
)
_TORCHAO = Optimizer("torchao", arguments={"bf16_stochastic_round": _BOOL})

OPTIMIZERS: dict[str, Optimizer] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), Optimizer()),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), Optimizer()),
    **dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), Optimizer()),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _ADEMAMIX),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), Optimizer(adam=False)),
    "adafactor": Optimizer(adam=False),
    "sgd": Optimizer(adam=False, arguments={"momentum": Range(), "dampening": Range(), "nesterov": _BOOL}),
    "adagrad": Optimizer(adam=False, arguments={"lr_decay": Range(), "eps": _POSITIVE}),
    "rmsprop": Optimizer(
        adam=False, arguments={"momentum": Range(), "alpha": _BETA, "eps": _POSITIVE, "centered": _BOOL}
    ),
    "grokadamw": Optimizer(
        "grokadamw",
        adam=False,
        arguments={
            "alpha_init": _BETA,
            "lamb": Range(),
            "gamma": Range(),
            "grokking_signal_decay_rate": Range(),
            "gradient_clipping": Range(),
        },
    ),
    "stable_adamw": Optimizer(
        "optimi", arguments={"max_lr": _POSITIVE, "kahan_sum": _ONLY_TRUE, "decouple_lr": _ONLY_TRUE}
    ),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), _TORCHAO),
    "adamw_anyprecision": Optimizer("torchdistx", refused="its package is not built for this PyTorch"),
    "adamw_torch_xla": Optimizer("torch_xla", refused="it is for TPUs"),
    "adamw_torch_npu_fused": Optimizer("torch_npu", refused="it is for Ascend NPUs"),
    **dict.fromkeys(
        (
            "galore_adamw",
            "galore_adamw_8bit",
            "galore_adafactor",
            "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise",
        ),
        _GALORE,
    ),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), _APOLLO),
    **dict.fromkeys(("lomo", "adalomo"), _LOMO),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"), _SCHEDULE_FREE),
}
"""transformers' names."""

OFFERED = tuple(name for name, each in OPTIMIZERS.items() if not each.refused and not each.package)
"""Those that work as they are."""

DISTRIBUTIONS = {"optimi": "torch-optimi"}
"""What pip calls a package, where its name differs."""

_INSTEAD = "use adamw_torch, adamw_8bit or paged_adamw_8bit"


def check(name: str, written: str | None, *, where: str, where_args: str) -> None:
    """Raise ConfigError when optimizer `name` cannot be used, or does not take `written` (`optim_args`)."""
    optimizer = OPTIMIZERS[name]
    if optimizer.refused:
        raise ConfigError(
            f"{where} is '{name}' (package {optimizer.package}): {optimizer.refused}; {_INSTEAD}"
        )
    if optimizer.package and importlib.util.find_spec(optimizer.package) is None:
        raise ConfigError(
            f"{where} is '{name}', but the package {distribution(optimizer)} is not installed; install it, "
            f"or {_INSTEAD}"
        )
    given = parsed(written, where_args)
    for key, value in given.items():
        if key not in optimizer.arguments:
            known = ", ".join(optimizer.arguments) or "none"
            instead = "; set the argument weight_decay" if key == "weight_decay" else ""
            raise ConfigError(
                f"{where_args} has '{key}'{nearest(key, optimizer.arguments)}, but optim '{name}' takes "
                f"{known}{instead}"
            )
        optimizer.arguments[key].check(value, f"{where_args} '{key}'")
    if given.get("nesterov", "false").lower() in ("true", "1", "yes") and (
        float(given.get("momentum", 0)) == 0 or float(given.get("dampening", 0)) != 0
    ):
        raise ConfigError(f"{where_args}: 'nesterov' needs a 'momentum' above 0 and no 'dampening'")


def distribution(optimizer: Optimizer) -> str:
    """Return what pip calls the package that an optimizer needs; "" for none."""
    return DISTRIBUTIONS.get(optimizer.package, optimizer.package)


def parsed(written: str | None, where: str) -> dict[str, str]:
    """Return the keys and values of "key=value,key=value"."""
    given = {}
    for pair in (written or "").replace(" ", "").split(",") if written else ():
        key, equals, value = pair.partition("=")
        if not (key and equals and value) or "=" in value:
            raise ConfigError(f"{where} is {written!r}, expected key=value,key=value")
        given[key] = value
    return given
