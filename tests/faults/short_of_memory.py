"""A tuning worker whose rank 1 runs out of GPU memory in every pass of more than 200 tokens.

python -m torch.distributed.run … -m tests.faults.short_of_memory JOB
"""

import os
import sys
from typing import Any

import torch

from runtime.tuning import __main__ as worker
from runtime.tuning import loss
from runtime.tuning.train import trainer

MOST_TOKENS = 200


def batch_loss(model: Any, batch: Any, device: str, **options: Any) -> torch.Tensor:
    """Fail in the backward pass: an earlier pass of the step may have left its gradients."""
    total = loss.batch_loss(model, batch, device, **options)
    if batch.tokens > MOST_TOKENS:
        total.register_hook(run_out)
    return total


def run_out(_: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        trainer.batch_loss = batch_loss
    sys.exit(worker.main(sys.argv[1:]))
