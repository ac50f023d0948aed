"""How an adapter's weights are initialised: to no update, or from the base model's weights.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) move the largest part of each weight into the adapter
and train that; the first weights are returned, so that what is saved is an update of the original base
again. LoftQ (arXiv:2310.08659) starts from the error of 4-bit quantisation in each weight. Does not know
training. r rank. Start at `initialise`.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from runtime.errors import ConfigError
from runtime.model_weights import WEIGHTS
from runtime.tuning.settings import Lora

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

NAMES = ("gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq")
"""`init_lora_weights` beside true and false; peft's others read data before training begins."""

FROM_BASE = ("pissa", "olora")
"""Those that take their weights out of the base."""


def check(lora: Lora, *, bits: int | None) -> None:
    """Raise ConfigError when the initialisation that `lora` names does not work on a base of `bits`."""
    options = lora.options
    init: str | bool = options.get("init_lora_weights", True)
    kind = init.partition("_niter_")[0] if isinstance(init, str) else init
    if isinstance(kind, str) and kind not in NAMES:
        raise ConfigError(
            f"LoraConfig.init_lora_weights is {init!r}, expected true, false, {', '.join(NAMES)}"
        )
    if isinstance(init, str) and "_niter_" in init and not init.partition("_niter_")[2].isdecimal():
        raise ConfigError(f"LoraConfig.init_lora_weights is {init!r}, expected pissa_niter_ and a number")
    ranks = [lora.r, *(options.get("rank_pattern") or {}).values()]
    if kind == "orthogonal" and any(rank % 2 for rank in ranks):
        raise ConfigError("init_lora_weights 'orthogonal' needs even ranks in r and rank_pattern")
    from_base = kind in FROM_BASE
    if options.get("use_dora") and (from_base or kind == "loftq"):
        raise ConfigError(f"LoraConfig has both use_dora and init_lora_weights {init!r}: choose one")
    if options.get("use_dora") and bits == 8:
        raise ConfigError("LoraConfig.use_dora does not go with load_in_8bit: use load_in_4bit")
    if from_base and bits is not None:
        raise ConfigError(
            f"init_lora_weights {init!r} changes the base weights, which are quantised: use method lora, or "
            "'loftq' with load_in_4bit"
        )
    if kind == "loftq" and (bits != 4 or (options.get("loftq_config") or {}).get("loftq_bits", 4) != 4):
        raise ConfigError("init_lora_weights 'loftq' makes up for 4 bits: use it with load_in_4bit")


def peft_options(lora: Lora) -> dict[str, Any]:
    """Return the options of `lora` for peft, without LoftQ's: `initialise` computes that."""
    if lora.options.get("init_lora_weights") != "loftq":
        return lora.options
    return {k: v for k, v in lora.options.items() if k not in {"init_lora_weights", "loftq_config"}}


def initialise(model: "PeftModel", lora: Lora, folder: Path) -> "dict[str, Tensor] | None":
    """Initialise a fresh adapter by LoftQ where `lora` says so, from the base's weights in `folder`.

    Returns the adapter's first weights, by their names in its file, where peft took them out of the base;
    else None. `adapters.save` subtracts them again.
    """
    from peft import get_peft_model_state_dict

    init = str(lora.options.get("init_lora_weights"))
    if init == "loftq":
        _init_loftq(model, folder)
    if not init.startswith(FROM_BASE):
        return None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: weights.detach().cpu().clone() for name, weights in state.items()}


def _init_loftq(model: "PeftModel", folder: Path) -> None:
    """Set every 4-bit layer's adapter to its quantisation error; `folder` holds the base's weights.

    The best update of rank r: a truncated singular value decomposition of W - dequantised(W). The base
    stays as it is, so the adapter belongs to the base quantised the same way.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    with torch.no_grad(), ExitStack() as stack:
        stored = {
            name: file
            for path in sorted(folder.glob(WEIGHTS))
            for file in [stack.enter_context(safe_open(str(path), framework="pt"))]
            for name in file.keys()  # noqa: SIM118 - not a mapping
        }
        for name, layer in _quantised_layers(model):
            if name not in stored:
                raise ConfigError(f"init_lora_weights 'loftq': {folder} has no {name}; leave it out")
            quantised = layer.get_base_layer().weight
            original = stored[name].get_tensor(name).to(quantised.device, torch.float32)
            error = original - dequantize_4bit(quantised.data, quantised.quant_state).float()
            rank, scaling = layer.r["default"], layer.scaling["default"]
            u, s, v = torch.svd_lowrank(error, q=min(2 * rank, *error.shape), niter=8)
            root = s[:rank].sqrt()
            lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            lora_a.data.copy_(root[:, None] * v[:, :rank].T)  # (r, in)
            lora_b.data.copy_(u[:, :rank] * root / scaling)  # (out, r)


def _quantised_layers(model: "PeftModel") -> Iterator[tuple[str, Any]]:
    """Yield the adapted 4-bit layers with the names of their weights in the base's files."""
    from bitsandbytes.nn.modules import Linear4bit
    from peft.tuners.lora import LoraLayer

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), Linear4bit):
            yield f"{name}.weight", module
