"""The matrices of an adapter with its scaling: what serving adds to a layer's output. Needs torch."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from runtime.adapters import lora_config
from runtime.adapters.folder import WEIGHTS_FILE, check_served
from runtime.adapters.lora_config import PREFIX
from runtime.errors import ConfigError


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
        pairs[path] = (down, up * (strength * scalings[path]))
    return pairs


def _finite(weights: dict[str, Tensor], tensor: str, adapter: str) -> Tensor:
    """Return a tensor in float32; ConfigError for one that no answer can be computed with."""
    values = weights[f"{PREFIX}{tensor}"].float()
    wrong = values.numel() - int(values.isfinite().sum())
    if wrong:
        raise ConfigError(
            f"adapter {adapter}: {tensor} holds NaN or Inf in {wrong} of {values.numel()} places: its "
            "training diverged; take an earlier checkpoint"
        )
    return values
