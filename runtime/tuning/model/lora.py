"""Attaches a LoRA adapter to a (quantised) base model: which modules, in which precision.

Adapter weights are float32 whatever the base is: half-precision LoRA loses small updates and dies in
the gradient scaler (LLaVA#294, qlora#71). Does not know training. Start at `attach`.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime import families
from runtime.config import nearest
from runtime.errors import ConfigError
from runtime.tuning.model import lora_init, lora_reach
from runtime.tuning.model.fsdp import is_sharded, reslice
from runtime.tuning.settings import Lora

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def attach(model: "PreTrainedModel", lora: Lora, *, checkpointing: bool = False) -> "PeftModel":
    """Freeze `model` and return it with a fresh adapter; ConfigError when `lora` does not fit it."""
    from peft import LoraConfig, get_peft_model

    from runtime.tuning.model import fused_ops

    targets = _targets(model, lora)
    _check_modules(model, lora.options)
    settings: dict[str, Any] = {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": "CAUSAL_LM",
        **lora_init.peft_options(lora),
    }
    model.requires_grad_(False)
    if checkpointing:
        model.enable_input_require_grads()
    try:
        config = LoraConfig(**settings)
        lora_reach.check(config, [name for name, _ in model.named_modules()])
        with warnings.catch_warnings():  # peft 0.21 still reads a property that transformers 5.23 renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (TypeError, ValueError, ImportError, AttributeError, NotImplementedError, IndexError) as error:
        raise ConfigError(f"LoraConfig does not fit this model: {' '.join(str(error).split())}") from None
    fused_ops.install(adapted)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    log.info("LoRA r=%d alpha=%d on %s: %d trained weights", lora.r, lora.alpha, targets, trained)
    return adapted


def _targets(model: "PreTrainedModel", lora: Lora) -> str | tuple[str, ...]:
    if not isinstance(lora.targets, str):
        return resolve_targets(lora.targets, linear_names(model))
    if lora.targets == "all-linear" and lora.options.get("layers_to_transform") is not None:
        return tuple(sorted(linear_names(model)))  # peft chooses layers among modules that are named
    return lora.targets


def _check_modules(model: "PreTrainedModel", options: Mapping[str, Any]) -> None:
    """Raise ConfigError for modules, parameters or tokens that `model` has not, or cannot train.

    peft passes over names that match nothing, and cannot train what is quantised.
    """
    for name in options.get("modules_to_save") or ():
        modules = [module for path, module in model.named_modules() if path.rpartition(".")[2] == name]
        if not modules:
            raise ConfigError(f"modules_to_save: no module '{name}' in this model")
        if any(not weight.is_floating_point() for module in modules for weight in module.parameters()):
            raise ConfigError(
                f"modules_to_save: '{name}' is quantised and cannot be trained whole; use method lora, or "
                "name it in target_modules"
            )
    for name in options.get("target_parameters") or ():
        found = [p for path, p in model.named_parameters() if path == name or path.endswith(f".{name}")]
        if not found or not all(weight.is_floating_point() for weight in found):
            what = "is quantised" if found else "is no parameter of this model"
            raise ConfigError(f"target_parameters: '{name}' {what}")
    tokens = options.get("trainable_token_indices") or ()
    for numbers in tokens.values() if isinstance(tokens, Mapping) else [tokens]:
        size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        if wrong := [number for number in numbers if number >= size]:
            raise ConfigError(f"trainable_token_indices: {wrong[0]} is no token; the vocabulary has {size}")


@contextlib.contextmanager
def evaluating(model: "nn.Module") -> Iterator[None]:
    """Within: no dropout and no gradients, and the quantised weights stay as training needs them.

    On CPUs with AVX512-BF16 a bitsandbytes 4-bit layer in evaluation mode repacks its weights in place
    for a bfloat16 kernel without a backward pass; training after that would silently lose most of its
    gradients. So those layers, which behave alike in both modes otherwise, stay in training mode.
    """
    import torch
    from bitsandbytes.nn.modules import Linear4bit

    # Inference tensors cannot be gathered into again for a backward pass.
    without_gradients = torch.no_grad() if is_sharded(model) else torch.inference_mode()
    was_training = model.training
    model.train(mode=False)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True
    try:
        with without_gradients:
            yield
    finally:
        model.train(mode=was_training)
        reslice(model)


def linear_names(model: "nn.Module") -> set[str]:
    """Return the last name parts of the model's linear layers, the output head left out."""
    from torch import nn

    names = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    return names - {"lm_head", "embed_out"}


def resolve_targets(wanted: Sequence[str], present: Iterable[str]) -> tuple[str, ...]:
    """Return `wanted` with split projection names replaced by the fused ones that are `present`.

    KAITO names Llama's projections for Phi-3 too, whose modules are fused: peft would adapt two of four
    kinds of modules without a warning.
    ConfigError when a name matches nothing.
    """
    present = set(present)
    found: list[str] = []
    for name in wanted:
        last = name.rpartition(".")[2]
        others = families.modules_called(last)
        before = name.removesuffix(last)
        options = [name] if last in present else [before + other for other in others if other in present]
        if not options:
            raise ConfigError(
                f"target_modules: no linear layer '{name}' in this model{nearest(last, present)}; "
                f"it has {', '.join(sorted(present))}; 'all-linear' adapts them all"
            )
        found.append(options[0])
    resolved = tuple(dict.fromkeys(found))
    if resolved != tuple(wanted):
        log.info("target_modules %s are called %s in this model", ",".join(wanted), ",".join(resolved))
    return resolved
