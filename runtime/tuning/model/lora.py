"""Attaches a LoRA adapter to a (quantised) base model: which modules, in which precision.

Adapter weights are float32 whatever the base is: half-precision LoRA loses small updates and dies in
the gradient scaler (LLaVA#294, qlora#71). Does not know training. Start at `attach`.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
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

    targets = (
        lora.targets if isinstance(lora.targets, str) else resolve_targets(lora.targets, linear_names(model))
    )
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
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"LoraConfig does not fit this model: {' '.join(str(error).split())}") from None
    fused_ops.install(adapted)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    log.info("LoRA r=%d alpha=%d on %s: %d trained weights", lora.r, lora.alpha, targets, trained)
    return adapted


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
