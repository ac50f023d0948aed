"""The pool's tensors: one arena for each kind of layer, copies within them, zeros."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.serving.engine import kv_pool
from runtime.serving.engine.batch import StepContext
from runtime.serving.engine.extents import Move
from runtime.serving.engine.kv_pool import KvPool, LayerKind, LayerKinds
from tests.families import config_of

KINDS = LayerKinds((LayerKind(None, 2, 4), LayerKind(8, 1, 4)), (0, 1, 0))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[KvPool]:
    """A pool whose every position holds its own number, and which copies 3 positions at a time."""
    monkeypatch.setattr(kv_pool, "PIECE", 3)
    made = KvPool(StepContext(), KINDS, positions=(20, 10), dtype=torch.float32, device=torch.device("cpu"))
    for layer in (*made.keys, *made.values):
        layer.copy_(torch.arange(len(layer))[:, None, None].expand_as(layer))
    return made


def test_layers_of_a_kind_have_positions_of_their_own_and_one_more_is_nobodys(pool: KvPool) -> None:
    assert [tuple(layer.shape) for layer in pool.keys] == [(21, 2, 4), (11, 1, 4), (21, 2, 4)]
    assert pool.scratch == (20, 10)


@pytest.mark.parametrize(
    ("source", "target", "count"), [(5, 3, 8), (3, 5, 8), (5, 4, 8), (4, 5, 7), (0, 10, 5), (10, 2, 8)]
)
def test_what_is_moved_arrives_whole_also_where_it_overlaps(
    pool: KvPool, source: int, target: int, count: int
) -> None:
    pool.move((Move(0, source, target, count),))
    expected = list(range(21))
    expected[target : target + count] = range(source, source + count)
    for layer in (pool.keys[0], pool.values[2]):
        assert layer[:, 1, 3].tolist() == expected
    assert pool.keys[1][:, 0, 0].tolist() == list(range(11)), "another kind"


class Allocations(TorchDispatchMode):
    """Counts tensors that have memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        self.made += isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known
        return out


def test_a_move_takes_no_memory_that_could_run_out(pool: KvPool) -> None:
    with Allocations() as allocations:
        pool.move((Move(0, 5, 3, 8), Move(0, 3, 5, 8), Move(1, 0, 5, 4)))
    assert allocations.made == 0


def test_what_is_cleared_is_zero_in_all_layers_of_its_kind(pool: KvPool) -> None:
    pool.clear(1, 4, 3)
    assert pool.values[1][:, 0, 0].tolist() == [0, 1, 2, 3, 0, 0, 0, 7, 8, 9, 10]
    assert pool.values[0][5, 0, 0] == 5


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("llama", [None, None]),
        ("mistral", [16, 16]),
        ("gemma2", [16, None]),
        ("gemma3_text", [16, None]),
        ("qwen2", [None, None]),
        ("qwen2, window in the upper layer", [None, 16]),
    ],
)
def test_the_kind_of_each_layer_follows_from_the_configuration(
    family: str, windows: list[int | None]
) -> None:
    found = LayerKinds.of(config_of(family))
    assert [found.kinds[kind].window for kind in found.of_layer] == windows


def test_a_window_that_holds_the_whole_context_is_none() -> None:
    found = LayerKinds.of(config_of("mistral", sliding_window=512))
    assert found.windows == (None,)
