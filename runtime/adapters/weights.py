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
    ConfigError for an adapter that cannot be served.
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
        down, up = (weights[f"{PREFIX}{path}.lora_{side}.weight"].float() for side in "AB")
        pairs[path] = (down, up * (strength * scalings[path]))
    return pairs
