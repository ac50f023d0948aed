"""Steps of attention without a model: an arena with ranges of sequences, and what torch's GPU kernels do.

The arena holds NaN wherever no range is, as if other sequences had gone wrong there. Start at `Step`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.serving.engine.attention import attend, layer_of
from runtime.serving.engine.attention_forms import AttentionLayer
from runtime.serving.engine.batch import Batch, Form, HostBatch, HostRanges, StepContext, assemble
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.kv_pool import KvPool, LayerKind, LayerKinds

aten = torch.ops.aten
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Run:
    """`count` tokens of a sequence whose range begins at `start`: the last of its `length` positions."""

    start: int
    length: int
    count: int = 1


DECODES = (Run(700, 1), Run(300, 201), Run(20, 64))
CHUNKS = (Run(600, 5, 5), Run(100, 112, 17), Run(517, 70, 3))
"""Ranges in no order, with gaps between them; the first chunk is the beginning of a prompt."""
POSITIONS = 800


class Step:
    """A layer's arena and a step over it: decoding sequences first, then chunks."""

    def __init__(
        self,
        form: Form,
        *,
        heads: tuple[int, int, int] = (4, 2, 64),
        window: int | None = None,
        runs: tuple[Run, ...] = (*DECODES, *CHUNKS),
        native: Kernels | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        **rules: Any,
    ) -> None:
        """`heads`: query heads, key-value heads, head dim; decoding sequences see at most the window."""
        torch.manual_seed(0)
        queries, kv_heads, dim = heads
        self.runs = tuple(
            replace(run, length=min(run.length, window or run.length)) if run.count == 1 else run
            for run in runs
        )
        kinds = LayerKinds((LayerKind(window, kv_heads, dim),), (0,))
        step = StepContext(native, form)
        self.pool = KvPool(step, kinds, positions=[POSITIONS], dtype=dtype, device=device)
        self.keys, self.values = self.pool.keys[0], self.pool.values[0]
        held = torch.zeros(len(self.keys), dtype=torch.bool)
        for run in self.runs:
            held[run.start : run.start + run.length] = True
        for states in (self.keys, self.values):
            drawn = torch.randn(states.shape)
            drawn[~held] = torch.nan
            states.copy_(drawn)
        self.query = torch.randn(self.tokens, queries + 2 * kv_heads, dim).to(device, dtype)[:, :queries]
        self.batch = self._assemble(device)
        self.layer: AttentionLayer = layer_of(self.pool, 0, **{"scaling": 0.2, **rules})

    @property
    def tokens(self) -> int:
        return sum(run.count for run in self.runs)

    def _assemble(self, device: torch.device) -> Batch:
        counts = [run.count for run in self.runs]
        host = HostBatch(
            ids=[1] * self.tokens, positions=[0] * self.tokens,
            decode_tokens=sum(run.count == 1 for run in self.runs), counts=counts,
            ranges=(HostRanges([run.start for run in self.runs], [run.length for run in self.runs]),),
            logit_indices=[0], adapters=[None] * self.tokens, long=[False] * self.tokens,
        )  # fmt: skip
        return assemble(host, None, device=device)

    def attend(self) -> Tensor:
        return attend(self.query, self.layer, self.batch)


def exact(step: Step) -> Tensor:
    """Return the attention (N, H, D) of a step in float64, one token and head after another."""
    layer, out, offset = step.layer, torch.empty(step.query.shape, dtype=torch.float64), 0
    group = step.query.shape[1] // layer.keys.shape[1]
    for run in step.runs:
        for token in range(run.count):
            end = run.length - run.count + token + 1
            first = 0 if layer.window is None else max(0, end - layer.window)
            seen = slice(run.start + first, run.start + end)
            for head in range(step.query.shape[1]):
                keys, values = (each[seen, head // group].double() for each in (layer.keys, layer.values))
                scores = keys @ step.query[offset, head].double() * layer.scaling
                if layer.softcap is not None:
                    scores = torch.tanh(scores / layer.softcap) * layer.softcap
                if layer.sinks is not None:
                    scores = torch.cat((scores, layer.sinks[head].double()[None]))
                out[offset, head] = scores.softmax(0)[: end - first] @ values
            offset += 1
    return out


class GpuKernels(TorchDispatchMode):
    """Within: torch's two varlen kernels of GPUs answer on a CPU, as their sources have it (2.11 to 2.13).

    flash_attn/flash_api.cpp (`mha_varlen_fwd`) and block_info.h: with `seqused_k`, `cum_seq_k` says where
    the keys of each sequence begin, and its last number is not used; a window counts from the diagonal of the
    lower right corner; the sums are (H, T). mem_eff_attention/kernel_forward.h (`advance_to_block`): the same
    of `cu_seqlens_k` with `seqlen_k`; `window_size` counts the token itself. What they refuse is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        """The kernel and its longest query, call by call."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._flash_attention_forward.default:
            return self._flash(*args, **(kwargs or {}))
        if func is aten._efficient_attention_forward.default:
            return self._efficient(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _flash(
        self, query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor,
        max_q: int, max_k: int, dropout: float, is_causal: bool, debug: bool, *,
        scale: float, window_size_left: int, window_size_right: int, seqused_k: Tensor,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append(("flash", max_q))
        assert (dropout, debug) == (0, False)
        assert query.shape[2] % 8 == 0
        assert query.shape[2] <= 256
        assert query.shape[1] % key.shape[1] == 0
        right = 0 if is_causal else window_size_right
        left = window_size_left
        if max_q == 1:  # then the query's place is the last key's, causal or not
            right = window_size_right
        out, sums = _varlen(
            query, key, value, scale=scale, starts=(cum_seq_q, cum_seq_k), lengths=seqused_k,
            most=(max_q, max_k), window=(left, right),
        )  # fmt: skip
        return out, sums, None, None, None

    def _efficient(
        self, query: Tensor, key: Tensor, value: Tensor, bias: None,
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout: float, custom_mask_type: int, compute_log_sumexp: bool = False, *,
        scale: float, seqlen_k: Tensor, window_size: int | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append(("efficient", max_seqlen_q))
        assert (bias, dropout, compute_log_sumexp) == (None, 0, False)
        assert custom_mask_type in (0, 2)
        assert custom_mask_type or not window_size
        assert len(query) == len(key) == len(value) == 1
        assert query.shape[2] == key.shape[2], "it has no groups of heads"
        left = window_size - 1 if window_size else -1
        out, _ = _varlen(
            query[0], key[0], value[0], scale=scale, starts=(cu_seqlens_q, cu_seqlens_k), lengths=seqlen_k,
            most=(max_seqlen_q, max_seqlen_k), window=(left, 0 if custom_mask_type else -1),
        )  # fmt: skip
        return out[None], None, None, None, max_seqlen_q, max_seqlen_k


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, *,
    scale: float, starts: tuple[Tensor, Tensor], lengths: Tensor,
    most: tuple[int, int], window: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out (T, H, D) and the logarithms of the sums (H, T)."""
    count = len(lengths)
    for numbers in (*starts, lengths):
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
    assert [len(each) for each in starts] == [count + 1, count + 1]
    assert {each.stride(-1) for each in (query, key, value)} == {1}
    assert all(
        stride * query.itemsize % 16 == 0 for each in (query, key, value) for stride in each.stride()[:-1]
    )
    out, sums = (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty(query.shape[1::-1]),
    )
    group = query.shape[1] // key.shape[1]
    bounds = starts[0].tolist()
    assert bounds[-1] == len(query)
    for row, (start, length) in enumerate(zip(starts[1].tolist(), lengths.tolist(), strict=False)):
        here = slice(bounds[row], bounds[row + 1])
        tokens = bounds[row + 1] - bounds[row]
        assert tokens <= most[0]
        assert length <= most[1]
        keys, values = (
            each[start : start + length].transpose(0, 1).repeat_interleave(group, 0) for each in (key, value)
        )
        scores = query[here].transpose(0, 1) @ keys.transpose(1, 2) * scale
        place = torch.arange(length)
        own = torch.arange(tokens)[:, None] + length - tokens
        hidden = torch.zeros(tokens, length, dtype=torch.bool)
        if window[0] >= 0:
            hidden |= place < own - window[0]
        if window[1] >= 0:
            hidden |= place > own + window[1]
        scores = scores.masked_fill(hidden, -torch.inf).float()
        out[here] = (scores.softmax(-1).to(values.dtype) @ values).transpose(0, 1)
        sums[:, here] = scores.logsumexp(-1).to(sums.dtype)
    return out, sums
