"""The shard of a model that each rank holds (tensor parallelism, arXiv:1909.08053, section 3).

Attention heads and the MLP's intermediate features are divided, so a shard is a model of the same
architecture with fewer of both: the engine, its cache and its memory plan need to know no more. The outputs
of the second linear layer of attention and MLP are then summed over the ranks (group.py). LoRA weights are
divided like the layer they adapt. Does not know processes. Start at `Shard.of` and `load`.
"""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from runtime import families, model_weights
from runtime.errors import ConfigError
from runtime.memory.shape import dimensions
from runtime.serving.engine import rope
from runtime.serving.engine.parallel.group import ROW_PARALLEL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Sliceable(Protocol):
    """A tensor, or one that is still in its file."""

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Shard:
    """The shard of rank `rank` among `world`; the sizes are those of the whole model."""

    rank: int
    world: int
    queries: int
    """Query heads times head dim."""
    keys: int
    """Key-value heads times head dim."""
    head_dim: int
    intermediate: int

    @classmethod
    def of(cls, config: "PreTrainedConfig", rank: int, world: int) -> "Shard":
        """Return the shard of `rank`; ConfigError, naming what is indivisible, when there is none."""
        text = config.get_text_config()
        if not families.find(config.model_type).own_layers:
            known = ", ".join(sorted(name for name, it in families.FAMILIES.items() if it.own_layers))
            raise ConfigError(f"--parallel tp does not know architecture '{config.model_type}', but {known}")
        if getattr(text, "quantization_config", None):
            raise ConfigError("--parallel tp divides whole weights, and this model's are quantised")
        if reason := rope.refusal(text):
            raise ConfigError(f"--parallel tp: {reason}")
        size = dimensions(text.to_dict())
        for count, what in ((size.heads, "attention heads"), (size.intermediate, "inner features")):
            if count % world:
                raise ConfigError(f"--parallel tp: {count} {what} cannot be divided among {world} processes")
        if size.kv_heads % world and world % size.kv_heads:
            raise ConfigError(
                f"--parallel tp: {size.kv_heads} key-value heads can neither be divided among {world} "
                "processes nor held by equally many of them"
            )
        queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
        return cls(rank, world, queries, keys, size.head_dim, size.intermediate)

    def config(self, whole: "PreTrainedConfig") -> "PreTrainedConfig":
        """Return the configuration of the shard, given the model's."""
        sharded = copy.deepcopy(whole)
        text = sharded.get_text_config()
        text.head_dim = self.head_dim
        text.num_attention_heads = self.queries // self.head_dim // self.world
        text.num_key_value_heads = max(1, self.keys // self.head_dim // self.world)
        text.intermediate_size = self.intermediate // self.world
        return sharded

    def slice_parameter(self, name: str, tensor: Sliceable) -> Tensor:
        """Return this rank's slice of the parameter `name`, the whole where it is not divided."""
        module, _, kind = name.rpartition(".")
        layer = module.rpartition(".")[2]
        if layer in ROW_PARALLEL and kind == "weight":
            return tensor[:, self._inputs(layer)]
        if layer in ROW_PARALLEL:  # a bias is added once to the sum
            whole = tensor[:]
            return whole if self.rank == 0 else torch.zeros_like(whole)
        outputs = self._outputs(layer)
        return torch.cat([tensor[each] for each in outputs]) if outputs else tensor[:]

    def slice_adapter(self, path: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's slice of the LoRA weights (r, in) and (out, r) of the layer at `path`.

        Weights of another size than the layer's are returned unchanged, for the adapter store to refuse.
        """
        layer = path.rpartition(".")[2]
        if layer in ROW_PARALLEL:
            fits = down.shape[1] == (self.queries if layer == "o_proj" else self.intermediate)
            return (down[:, self._inputs(layer)] if fits else down), up
        outputs = self._outputs(layer)
        fits = up.shape[0] == self._width(layer)
        return down, torch.cat([up[each] for each in outputs]) if outputs and fits else up

    def _inputs(self, layer: str) -> slice:
        return self._slice(self.queries if layer == "o_proj" else self.intermediate)

    def _outputs(self, layer: str) -> Sequence[slice]:
        """Return which outputs of `layer` this rank computes, those of fused layers in their order."""
        queries, inner = self._slice(self.queries), self._slice(self.intermediate)
        keys = self._key_slice()
        after = self.queries, self.queries + self.keys
        return {
            "q_proj": (queries,),
            "k_proj": (keys,),
            "v_proj": (keys,),
            "qkv_proj": (queries, _shifted(keys, after[0]), _shifted(keys, after[1])),
            "gate_proj": (inner,),
            "up_proj": (inner,),
            "gate_up_proj": (inner, _shifted(inner, self.intermediate)),
        }.get(layer, ())

    def _width(self, layer: str) -> int:
        """Return how many outputs `layer` has in the whole model."""
        fused = {"qkv_proj": self.queries + 2 * self.keys, "gate_up_proj": 2 * self.intermediate}
        split = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}
        return (fused | split).get(layer, self.intermediate)

    def _slice(self, count: int) -> slice:
        width = count // self.world
        return slice(self.rank * width, (self.rank + 1) * width)

    def _key_slice(self) -> slice:
        """Return the key-value heads of this rank; with fewer than ranks, several ranks hold the same one."""
        heads = self.keys // self.head_dim
        if heads >= self.world:
            return self._slice(self.keys)
        first = self.rank * heads // self.world * self.head_dim
        return slice(first, first + self.head_dim)


def _shifted(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


def load(
    folder: Path, whole: "PreTrainedConfig", own_shard: Shard, *, dtype: torch.dtype, device: str
) -> "PreTrainedModel":
    """Return this rank's shard of the model in `folder`, in evaluation mode; only its slices are read.

    ConfigError when a weight is missing or has another shape than the configuration says.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    model_weights.check_files(folder)
    config = own_shard.config(whole)
    with torch.device(device), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False).train(mode=False)
    model.tie_weights()
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    targets = dict(model.named_parameters())
    missing, unread = set(targets), set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                if name in targets:
                    tensor = own_shard.slice_parameter(name, weights.get_slice(name))
                    if tensor.shape != targets[name].shape:
                        raise ConfigError(f"{file}: {name} does not have the shape that config.json says")
                    targets[name].copy_(tensor)
                    missing.discard(name)
                else:
                    unread.add(name)
    if missing:
        raise ConfigError(f"model directory {folder}: no weights for {min(missing)} in its *.safetensors")
    if own_shard.rank == 0:
        model_weights.say_unread(model, unread, what=f"model directory {folder}")
    return model
