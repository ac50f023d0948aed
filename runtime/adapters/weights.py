"""The matrices of an adapter with its scaling: what serving adds to a layer's output. Needs torch.

Computes a small piece at a time, which torch does in the thread that asks: an adapter is read beside an
engine, which the pool of threads of every further one that computes in parallel slows down (see
RequestQueue.call).
Start at `scaled_pairs`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from runtime.adapters import lora_config
from runtime.adapters.folder import WEIGHTS_FILE, check_served, in_one_line
from runtime.adapters.lora_config import PREFIX
from runtime.errors import ConfigError

PIECE = 1 << 14
"""Elements; torch divides an operation among threads from 32,768 on."""


@in_one_line()
def scaled_pairs(
    folder: Path, *, name: str | None = None, strength: float = 1.0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by module the LoRA pair (A, B) of the adapter in `folder`: A (r, in) and B (out, r) in float32.

    B is multiplied by `strength` and by the adapter's scaling; the rank is that of the matrices. Raises
    ConfigError for an adapter that cannot be served, also for its weights.
    """
    adapter = check_served(folder, name=name)
    weights = load_file(str(folder / WEIGHTS_FILE))
    ranks = {path: adapter.shapes[f"{path}.lora_A.weight"][0] for path in adapter.paths}
    try:
        scalings = lora_config.scalings(adapter.fields, ranks)
    except ConfigError as error:
        raise ConfigError(f"adapter {adapter.name}: {error}") from None
    pairs = {}
    for path in adapter.paths:
        down, up = (_finite(weights, f"{path}.lora_{side}.weight", adapter.name) for side in "AB")
        pairs[path] = (down, in_pieces(up, torch.float32, factor=strength * scalings[path]))
    return pairs


def in_pieces(values: Tensor, dtype: torch.dtype, *, factor: float = 1.0) -> Tensor:
    """Return `values` times `factor` as `dtype`, computed in this thread alone."""
    result = torch.empty(values.shape, dtype=dtype)
    for piece, target in zip(_pieces(values), _pieces(result), strict=True):
        target.copy_(piece if factor == 1 else piece * factor)
    return result


def not_finite(values: Tensor) -> int:
    """Return how many of `values` are NaN or Inf."""
    return sum(piece.numel() - int(piece.isfinite().sum()) for piece in _pieces(values))


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    """Return views of a whole tensor's elements, in order."""
    return torch.split(values.view(-1), PIECE)


def _finite(weights: dict[str, Tensor], tensor: str, adapter: str) -> Tensor:
    """Return a tensor in float32; ConfigError for one that no answer can be computed with."""
    values = in_pieces(weights[f"{PREFIX}{tensor}"], torch.float32)
    wrong = not_finite(values)
    if wrong:
        raise ConfigError(
            f"adapter {adapter}: {tensor} holds NaN or Inf in {wrong} of {values.numel()} places: its "
            "training diverged; take an earlier checkpoint"
        )
    return values
