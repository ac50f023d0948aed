"""FSDP2 for LoRA: each rank keeps a shard of the frozen base model, and all of the small adapter.

The base is what does not fit. The adapter is a few thousandths of it and stays an ordinary tensor on every
rank, so its checkpoints and files are those of DDP, and its gradients need one all-reduce a step. Every
forward pass is a collective: all ranks make the same number of them. Does not know the trainer. Start at
`shard`.
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

log = logging.getLogger(__name__)


def shard(model: "PeftModel", *, world: int, device: str) -> None:
    """Shard the base of `model` over `world` ranks, a decoder layer at a time.

    A layer moves to `device` unsharded, then all but this rank's shard of it is freed: the device holds its
    shards and at most one layer more, wherever `model` was loaded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.partition(":")[0], (world,))
    adapter = {parameter for parameter in model.parameters() if parameter.requires_grad}
    base = model.get_base_model()
    unsharded_mib = _mebibytes(base)
    for layer in (*decoder_layers(base), base):
        layer.to(device)  # not left to fully_shard: the constants of quantised weights have to move too
        fully_shard(layer, mesh=mesh, ignored_params=adapter)
    log.info(
        "base model sharded: %.1f of %.1f MiB on each of %d ranks", _mebibytes(base), unsharded_mib, world
    )


def _mebibytes(model: "nn.Module") -> float:
    """Return the size of the frozen weights on this rank."""
    from torch.distributed.tensor import DTensor

    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in frozen]
    return sum(tensor.numel() * tensor.element_size() for tensor in local) / 2**20


def decoder_layers(model: "nn.Module") -> "Iterable[nn.Module]":
    """Return the model's repeated blocks: its longest list of modules."""
    from torch import nn

    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=())


def is_sharded(model: "nn.Module") -> bool:
    """Whether `shard` was applied to `model`."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def reslice(model: "nn.Module") -> None:
    """Free what forward passes gathered of every module when no backward pass followed them.

    FSDP2 leaves the outermost module gathered until a backward pass. Rank 0 alone writes checkpoints, and
    reading a state_dict shards that module again there only: the next forward passes would not match.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average_gradients(parameters: "Iterable[nn.Parameter]", world: int) -> None:
    """Replace each gradient by its mean over all ranks, as DDP does for a model that it wraps."""
    import torch
    from torch import distributed

    gradients: list[torch.Tensor] = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(world)
    distributed.all_reduce(flat)
    means = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
