"""Attention, MLP and norm modules over flat tokens, in place of transformers' own in families that are alike.

The same arithmetic in fewer, larger operations. Shapes: `N` flat tokens, `H` query heads, `K` key-value
heads, `D` head dim, `d` rotary dims. Does not know model classes (patch.py chooses) or requests. Start at
`FusedAttention`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from runtime.serving.engine.attention import attend, layer_of
from runtime.serving.engine.batch import Batch, StepContext
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.kv_pool import KvPool, store
from runtime.serving.engine.linear import HooklessModule, LinearLayouts, is_plain, merge
from runtime.serving.engine.lora import LoraLinear, LoraTarget
from runtime.serving.engine.parallel.group import ROW_PARALLEL, Group, RowParallel, VocabParallel


class LayerFactory:
    """Makes the linear layers that take adapters, and keeps them by their module paths."""

    def __init__(self, step: StepContext, layouts: LinearLayouts, *, group: Group | None = None) -> None:
        self.targets: dict[str, LoraTarget] = {}
        self.step = step
        self._layouts, self._group = layouts, group

    def linear(self, name: str, module: nn.Module) -> nn.Module:
        """Return `module`, found at `name`, as one that takes adapters, summed over ranks if row-parallel."""
        layer = self._adaptable(name, module)
        partial = self._group is not None and name.endswith(ROW_PARALLEL)
        return RowParallel(layer, self._group) if partial and self._group is not None else layer

    def _adaptable(self, name: str, module: nn.Module) -> LoraLinear:
        layer = LoraLinear(
            self._layouts.fast(module),
            self.step,
            in_features=int(module.in_features),  # type: ignore[arg-type]
            out_features=(int(module.out_features),),  # type: ignore[arg-type]
        )
        self.targets[name] = LoraTarget(layer, 0)
        return layer

    def head(self, module: nn.Module) -> nn.Module:
        """Return the output embedding as a fast layer; each rank has its shard of the vocabulary."""
        if (
            self._group is None
            or not isinstance(module, nn.Linear)
            or module.out_features % self._group.world
        ):
            return self._layouts.fast(module)
        width = module.out_features // self._group.world
        tokens = slice(self._group.rank * width, (self._group.rank + 1) * width)
        with torch.device("meta"):
            shard = nn.Linear(module.in_features, width, bias=module.bias is not None)
        shard.weight = nn.Parameter(module.weight[tokens].clone(), requires_grad=False)
        if module.bias is not None:
            shard.bias = nn.Parameter(module.bias[tokens].clone(), requires_grad=False)
        return VocabParallel(self._layouts.fast(shard), self._group)

    def merged(self, named: dict[str, nn.Module]) -> nn.Module:
        """Return one layer for several with the same input: one product where their weights allow it."""
        plain = [module for module in named.values() if isinstance(module, nn.Linear) and is_plain(module)]
        if len(plain) < len(named):
            return SideBySide([self._adaptable(name, module) for name, module in named.items()])
        layer = LoraLinear(
            self._layouts.fast(merge(plain)),
            self.step,
            in_features=plain[0].in_features,
            out_features=tuple(module.out_features for module in plain),
        )
        for index, name in enumerate(named):
            self.targets[name] = LoraTarget(layer, index)
        return layer


class SideBySide(HooklessModule):
    """Several layers side by side: quantised weights are not merged."""

    def __init__(self, layers: list[LoraLinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., sum of outs) for x (..., in)."""
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


class FusedAttention(HooklessModule):
    """Attention of families with `own_layers` over flat tokens: one product for q, k and v, one rotation."""

    def __init__(self, name: str, source: Any, cache: KvPool, layers: LayerFactory) -> None:
        super().__init__()
        config = source.config
        self._step, self._dim = cache.step, int(source.head_dim)
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._attention = layer_of(cache, int(source.layer_idx), scaling=float(source.scaling))
        if hasattr(source, "qkv_proj"):
            self.qkv: nn.Module = layers.linear(f"{name}.qkv_proj", source.qkv_proj)
        else:
            names = [f"{each}_proj" for each in "qkv"]
            self.qkv = layers.merged({f"{name}.{each}": getattr(source, each) for each in names})
        self.out = layers.linear(f"{name}.o_proj", source.o_proj)
        self.q_norm, self.k_norm = getattr(source, "q_norm", None), getattr(source, "k_norm", None)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> tuple[Tensor, None]:
        """Return (1, N, hidden) for (1, N, hidden); cos and sin are (1, N, rotary dim)."""
        batch = self._step.running
        tokens = hidden_states.shape[1]
        qkv = self.qkv(hidden_states).view(tokens, -1, self._dim)  # (N, H + 2 K, D)
        if self.q_norm is not None and self.k_norm is not None:
            query, key, value = qkv.split((self._heads, self._kv_heads, self._kv_heads), 1)
            qkv = torch.cat((self.q_norm(query), self.k_norm(key), value), 1)
        query = self._rotate(qkv, position_embeddings, batch)
        attended = attend(query, self._attention, batch)
        return self.out(attended.view(1, tokens, -1)), None

    def _rotate(self, qkv: Tensor, cos_sin: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """Store keys and values of qkv (N, H + 2 K, D), and return the queries (N, H, D), all rotated."""
        layer = self._attention
        if layer.kernel is not None:
            layer.kernel.rotate(qkv, cos_sin, stores=batch.ranges[layer.kind].stores)
            return qkv[:, : self._heads]
        rotated = rotate(qkv[:, : self._heads + self._kv_heads], *cos_sin)
        store(layer.keys, rotated[:, self._heads :], batch, kind=layer.kind)
        store(layer.values, qkv[:, self._heads + self._kv_heads :], batch, kind=layer.kind)
        return rotated[:, : self._heads]


class FalconAttention(HooklessModule):
    """Falcon's attention over flat tokens, for its three layouts of the fused projection."""

    def __init__(self, source: Any, cache: KvPool) -> None:
        super().__init__()
        self._step, self._dim = cache.step, int(source.head_dim)
        self._kv_heads = int(source.num_kv_heads)
        self._interleaved = bool(source.new_decoder_architecture) or not source.multi_query
        self._attention = layer_of(cache, int(source.layer_idx), scaling=self._dim**-0.5)
        self.query_key_value, self.dense = source.query_key_value, source.dense

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> tuple[Tensor, None]:
        """Return (1, N, hidden) for (1, N, hidden)."""
        batch = self._step.running
        tokens = hidden_states.shape[1]
        fused = self.query_key_value(hidden_states)
        if self._interleaved:  # each key-value head: its queries, its key, its value
            grouped = fused.view(tokens, self._kv_heads, -1, self._dim)
            query, key, value = grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]
        else:
            flat = fused.view(tokens, -1, self._dim)
            query, key, value = flat[:, :-2], flat[:, -2:-1], flat[:, -1:]
        kind = self._attention.kind
        store(self._attention.keys, rotate(key, *position_embeddings), batch, kind=kind)
        store(self._attention.values, value, batch, kind=kind)
        attended = attend(rotate(query, *position_embeddings), self._attention, batch)
        return self.dense(attended.view(1, tokens, -1)), None


class FusedMlp(HooklessModule):
    """Gated MLP with one product for gate and up."""

    def __init__(self, name: str, source: Any, layers: LayerFactory) -> None:
        super().__init__()
        self.gate_up = layers.merged(
            {f"{name}.gate_proj": source.gate_proj, f"{name}.up_proj": source.up_proj}
        )
        self.down = layers.linear(f"{name}.down_proj", source.down_proj)
        self.act = source.act_fn
        sample = torch.linspace(-4, 4, 9)
        is_silu = torch.allclose(self.act(sample), silu(sample))
        self._kernels = layers.step.kernels if is_silu else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (1, N, hidden) for (1, N, hidden)."""
        gate_up = self.gate_up(x)
        if self._kernels is not None:
            inner = self._kernels.gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            inner = self.act(gate).mul_(up)
        out: Tensor = self.down(inner)
        return out


class RMSNorm(HooklessModule):
    """RMS norm in one call (arXiv:1910.07467), for the classes that multiply by the weight itself."""

    def __init__(self, weight: Tensor, eps: float, kernels: Kernels | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self._eps, self._kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., hidden) over its root mean square, times the weight."""
        return rms_norm(x, self.weight.shape, self.weight, self._eps)

    def add(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return hidden plus `update`, and the norm of that; hidden may be changed in place."""
        if self._kernels is not None:
            return hidden, self._kernels.norm(hidden, update, self.weight, self._eps)
        hidden = hidden if update is None else hidden + update
        return hidden, self(hidden)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (N, heads, D) by cos and sin (1, N, d): the first d dims, halves paired (arXiv:2104.09864)."""
    size, half = cos.shape[-1], cos.shape[-1] // 2
    cos, sin = cos[0][:, None], sin[0][:, None]
    rotated = x.clone() if size < x.shape[-1] else torch.empty_like(x)
    torch.mul(x[..., :size], cos, out=rotated[..., :size])
    rotated[..., :half].addcmul_(x[..., half:size], sin[..., :half], value=-1)
    rotated[..., half:size].addcmul_(x[..., :half], sin[..., half:])
    return rotated
