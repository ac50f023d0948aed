"""What torch's attention kernels for sequences end to end compute, in plain operations: only CUDA has them.

Written from what torch's C++ says of their arguments, so that code that calls them runs on a CPU with real
numbers. Start at `VarlenKernels`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class VarlenKernels(TorchDispatchMode):
    """Within: the kernels work on CPU tensors; `calls` has the name and the arguments of each call.

    Without `compute` they are noted, and left to torch, whose meta tensors have them.
    """

    def __init__(self, *, compute: bool = True) -> None:
        super().__init__()
        self.compute = compute
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        kernel = KERNELS.get(name)
        if kernel is None:
            return func(*args, **kwargs)
        self.calls.append((name, args, kwargs))
        return (kernel if self.compute else func)(*args, **kwargs)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, query_borders: Tensor, key_borders: Tensor, max_q: int,
    max_k: int, dropout: float, is_causal: bool, debug: bool, *, scale: float | None = None,
    window_size_left: int = -1, window_size_right: int = -1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """query (T, H, D), key and value (T, K, D), any K that divides H."""
    assert not (dropout or debug)
    _check_borders(query_borders, key_borders, query, max_q, max_k)
    after = 0 if is_causal else window_size_right
    out = _attend(query, key, value, query_borders, scale=scale, before=window_size_left, after=after)
    seed, offset = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return out, query.new_zeros(query.shape[1], len(query)).float(), seed, offset, query.new_zeros(0)


def _flash_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor,
    query_borders: Tensor, key_borders: Tensor, max_q: int, max_k: int, dropout: float, is_causal: bool,
    seed: Tensor, offset: Tensor, *, scale: float | None = None, window_size_left: int = -1,
    window_size_right: int = -1,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not dropout
    assert statistics.shape == (query.shape[1], len(query))
    _check_borders(query_borders, key_borders, query, max_q, max_k)
    after = 0 if is_causal else window_size_right
    rules = {"scale": scale, "before": window_size_left, "after": after}
    return _gradients(gradient, (query, key, value), query_borders, rules)


def _efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: None, query_borders: Tensor, key_borders: Tensor,
    max_q: int, max_k: int, dropout: float, mask_type: int, statistics: bool, *, scale: float | None = None,
    window_size: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """query, key and value (1, T, H, D): no groups."""
    assert statistics
    assert not dropout
    assert mask_type == 1
    assert query.shape == key.shape == value.shape
    _check_borders(query_borders, key_borders, query[0], max_q, max_k)
    out = _attend(
        query[0], key[0], value[0], query_borders, scale=scale, before=(window_size or 0) - 1, after=0
    )
    width = -(-max_q // 32) * 32
    found = torch.zeros(len(query_borders) - 1, query.shape[2], width)
    zero = torch.zeros((), dtype=torch.int64)
    return out[None], found, zero, zero, max_q, max_k


def _efficient_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: None, out: Tensor,
    query_borders: Tensor, key_borders: Tensor, max_q: int, max_k: int, statistics: Tensor, dropout: float,
    seed: Tensor, offset: Tensor, mask_type: int, bias_gradient: bool, *, scale: float | None = None,
    window_size: int | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    assert not (bias_gradient or dropout)
    assert mask_type == 1
    assert out.shape == gradient.shape == query.shape == key.shape == value.shape
    assert len(statistics) == len(query_borders) - 1
    _check_borders(query_borders, key_borders, query[0], max_q, max_k)
    rules = {"scale": scale, "before": (window_size or 0) - 1, "after": 0}
    states = (query[0], key[0], value[0])
    found = _gradients(gradient[0], states, query_borders, rules)
    return (*(each[None] for each in found), None)


def _check_borders(queries: Tensor, keys: Tensor, query: Tensor, max_q: int, max_k: int) -> None:
    assert queries.dtype == keys.dtype == torch.int32
    assert torch.equal(queries, keys)
    assert (int(queries[0]), int(queries[-1])) == (0, len(query))
    assert max_q == max_k == int(queries.diff().max())


def _weights(
    query: Tensor, key: Tensor, borders: Tensor, *, scale: float | None, before: int, after: int
) -> Tensor:
    """Return (H, T, T): of `before` keys before a query's own and `after` behind it, of all where < 0."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    number = torch.searchsorted(borders[1:].contiguous(), torch.arange(len(query)), right=True)
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))[None]
    seen = number[:, None] == number[None]
    if before >= 0:
        seen &= distance <= before
    if after >= 0:
        seen &= distance >= -after
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * (scale or query.shape[-1] ** -0.5)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _attend(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, **rules: Any) -> Tensor:
    weights = _weights(query, key, borders, **rules)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)


def _gradients(
    gradient: Tensor, states: tuple[Tensor, ...], borders: Tensor, rules: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Return those of query, key and value: written out, as autograd records nothing below the mode."""
    query, key, value = states
    group, scale = query.shape[1] // key.shape[1], rules["scale"] or query.shape[-1] ** -0.5
    weights = _weights(query, key, borders, **rules)
    wide_key, wide_value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    grad_value = torch.einsum("hqk,qhd->khd", weights, gradient)
    grad_weights = torch.einsum("qhd,khd->hqk", gradient, wide_value)
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
    grad_query = torch.einsum("hqk,khd->qhd", grad_scores, wide_key)
    grad_key = torch.einsum("hqk,qhd->khd", grad_scores, query)
    return grad_query, *(each.unflatten(1, (-1, group)).sum(2) for each in (grad_key, grad_value))


KERNELS = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_backward": _flash_backward,
    "_efficient_attention_forward": _efficient_forward,
    "_efficient_attention_backward": _efficient_backward,
}
