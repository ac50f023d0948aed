"""The adapters resident beside one model: read from folders, placed in its row layers, taken out again.

Knows peft's file format, not peft: weights go straight into the stacks of lora.py. Does not know
requests. Start at `Bank.add`.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from runtime.adapters import CONFIG_FILE, WEIGHTS_FILE, scaling
from runtime.errors import ConfigError
from runtime.serving.engine.lora import MASKED, Groups, PartWeights, RowLinear, group, mask

_PREFIX = "base_model.model."

Cut = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a layer's path and its LoRA weights (r, in) and (out, r) to the parts of them that belong here."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where one of the model's own linear layers lives: it is part `index` of `layer`."""

    layer: RowLinear
    index: int


class Bank:
    """Adapters by name; each has a version (never used twice) and a lane (its place in the stacks)."""

    def __init__(
        self,
        parts: dict[str, Part],
        *,
        dtype: torch.dtype,
        device: torch.device,
        cut: "Cut | None" = None,
        own: bool = False,
    ) -> None:
        """`parts` by the module paths that adapters name; `cut` where layers are parts of the model's.

        `own` where kernels give scattered tokens their own adapters.
        """
        self._parts = parts
        self._cut, self._own = cut, own
        self._layers = list({id(part.layer): part.layer for part in parts.values()}.values())
        self.device, self._dtype = device, dtype
        self._versions: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._lanes: dict[int, int] = {}
        self._width = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The resident adapters."""
        return tuple(self._versions)

    def version(self, name: str | None) -> int | None:
        """Return the version that `name` stands for now; None for the base."""
        return None if name is None else self._versions[name]

    def group(self, owners: Sequence[tuple[int | None, int]]) -> Groups | None:
        """Sort a batch's flat tokens by adapter, given (version or None, count) in flat order."""
        lanes = [(None if version is None else self._lanes[version], count) for version, count in owners]
        return group(lanes, resident=self._width, device=self.device, dtype=self._dtype, own=self._own)

    @property
    def is_masked(self) -> bool:
        """Whether so few adapters are resident that one product over all of them is the cheapest form."""
        return self._width <= MASKED

    def mask(self, owners: Sequence[int | None]) -> Tensor:
        """Return (T, 1, A, 1), one where each of T tokens has its adapter, given by version."""
        lanes = [None if version is None else self._lanes[version] for version in owners]
        return mask(lanes, resident=self._width, device=self.device, dtype=self._dtype)

    def read(self, name: str, folder: Path, *, strength: float) -> dict[RowLinear, PartWeights]:
        """Return the adapter's (r, in) and scaled (out, r) by layer and part; ConfigError if unfit."""
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if config.get("use_dora") or config.get("lora_bias") or config.get("bias", "none") != "none":
            raise ConfigError(f"adapter {name}: has DoRA or trained biases, expected plain LoRA weights")
        found: dict[RowLinear, PartWeights] = {}
        pairs = _pairs(name, load_file(str(folder / WEIGHTS_FILE)))
        for path, pair in pairs.items():
            part = self._parts.get(path)
            if part is None:
                raise ConfigError(f"adapter {name}: does not fit this model: no layer '{path}' to adapt here")
            down, up = pair if self._cut is None else self._cut(path, *pair)
            expected = (part.layer.in_features, part.layer.outs[part.index])
            if (down.shape[1], up.shape[0]) != expected or down.shape[0] != up.shape[1]:
                raise ConfigError(
                    f"adapter {name}: does not fit this model: {path} maps {down.shape[1]} to {up.shape[0]} "
                    f"features, expected {expected[0]} to {expected[1]}"
                )
            scale = strength * scaling(config, path, down.shape[0])
            found.setdefault(part.layer, {})[part.index] = (
                down.to(self.device, self._dtype),
                (up.float() * scale).to(self.device, self._dtype),
            )
        return found

    def add(self, name: str, weights: dict[RowLinear, PartWeights]) -> None:
        """Make what `read` returned answerable under `name`."""
        taken = set(self._lanes.values())
        lane = next(number for number in itertools.count() if number not in taken)
        self._width = 1 + max(lane, *taken) if taken else 1
        for layer in self._layers:
            layer.place(lane, weights.get(layer, {}), lanes=self._width)
        version = next(self._numbers)
        self._lanes[version] = lane
        self._versions[name] = version

    def remove(self, name: str) -> int:
        """Forget an adapter that no row uses, and return its version; its lane is free for the next."""
        version = self._versions.pop(name)
        del self._lanes[version]
        if not self._lanes:
            for layer in self._layers:
                layer.clear()
        return version


def _pairs(name: str, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (lora_A, lora_B) by module path."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key, down in weights.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        other = f"{key.removesuffix('.lora_A.weight')}.lora_B.weight"
        if other not in weights:
            raise ConfigError(f"adapter {name}: {path} has lora_A but no lora_B weights")
        pairs[path] = (down, weights[other])
    strange = [key for key in weights if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange or 2 * len(pairs) != len(weights):
        odd = strange[0] if strange else "lora_B without lora_A"
        raise ConfigError(f"adapter {name}: holds {odd}, expected lora_A and lora_B of linear layers only")
    return pairs
