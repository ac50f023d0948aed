"""Adapters beside base weights: the arithmetic, what one of NaN touches, what is read, and what is kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.errors import ConfigError
from runtime.serving.engine import lora
from runtime.serving.engine.batch import StepContext
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.lora import AdapterStore, LoraLinear, LoraTarget
from tests.serving.engine.calls import save_adapter

IN, OUTS = 32, (48, 16)


class Model:
    """Two layers that take adapters: one of two modules, one of one."""

    def __init__(self, *, kernels: Kernels | None = None, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.step = StepContext(kernels)
        self.layers = [
            LoraLinear(
                torch.nn.Linear(IN, sum(outs), bias=False, device=device),
                self.step,
                in_features=IN,
                out_features=outs,
            )
            for outs in (OUTS, (16,))
        ]
        targets = {f"m{index}": LoraTarget(self.layers[0], index) for index in range(2)}
        targets["o"] = LoraTarget(self.layers[1], 0)
        self.store = AdapterStore(
            targets, dtype=torch.float32, device=torch.device(device), per_token=kernels is not None
        )

    def add(
        self, name: str, monkeypatch: pytest.MonkeyPatch, **ranks: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Load random weights of these ranks, by path; returns them."""
        outs = {"m0": OUTS[0], "m1": OUTS[1], "o": 16}
        pairs = {p: (torch.randn(r, IN), torch.randn(outs[p], r)) for p, r in ranks.items()}
        monkeypatch.setattr(lora, "scaled_pairs", lambda *_, **__: pairs)
        self.store.add(name, self.store.stage(self.store.read(name, Path(), strength=1.0)))
        return pairs

    def run(self, x: Tensor, adapters: list[str | None], layer: int = 0) -> Tensor:
        """Return the output of a layer for x (1, N, in)."""
        groups = self.store.group([self.store.version(name) for name in adapters])
        self.step.batch = SimpleNamespace(adapter_groups=groups)  # type: ignore[assignment]
        with torch.inference_mode():
            out: Tensor = self.layers[layer](x)
            return out


def updated(model: Model, x: Tensor, adapters: list[str | None], weights: dict[str, Any]) -> Tensor:
    """Return what the first layer's output should be."""
    out = model.layers[0].base(x).detach()
    for token, name in enumerate(adapters):
        for path, columns in (("m0", slice(0, OUTS[0])), ("m1", slice(OUTS[0], None))):
            if name is not None and path in weights[name]:
                down, up = weights[name][path]
                out[0, token, columns] += x[0, token] @ down.T @ up.T
    return out


ORDERS = [
    ["a"], ["a", "a", None, "b"], ["a", "b", "a", None, "c", "b"],
    [*"abc", *["a"] * 20], [*["b"] * 20, "c", "a", None, "c"],
]  # fmt: skip


@pytest.mark.parametrize("adapters", ORDERS)
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("piece", [1, 64 << 20])
def test_each_token_gets_its_own_adapter_whatever_others_have(
    adapters: list[str | None], kernels: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "GATHERED_BYTES", piece)
    model = Model(kernels=Kernels.find() if kernels else None)
    weights = {
        "a": model.add("a", monkeypatch, m0=4, m1=2),
        "b": model.add("b", monkeypatch, m1=8),
        "c": model.add("c", monkeypatch, m0=3, o=5),
    }
    x = torch.randn(1, len(adapters), IN)
    torch.testing.assert_close(
        model.run(x, adapters), updated(model, x, adapters, weights), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("adapters", ORDERS)
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_nan_in_one_adapter_stays_in_the_rows_of_its_own_tokens(
    adapters: list[str | None], kernels: bool, broken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(kernels=Kernels.find() if kernels else None)
    for name in "abc":
        model.add(name, monkeypatch, m0=4, m1=4)
    x = torch.randn(1, len(adapters), IN)
    expected = model.run(x, adapters)
    stacks = model.layers[0].stacks
    assert stacks is not None
    stacks.rows[model.store.slots([model.store.version("a")])[0]] = broken  # after it was loaded
    out = model.run(x, adapters)
    own = torch.tensor([name == "a" for name in adapters])
    assert torch.equal(out[0, ~own], expected[0, ~own])
    assert not out[0, own].isfinite().any()


class Reads(TorchDispatchMode):
    """Counts operations, and the bytes of weights that they read."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.storage = weights.untyped_storage().data_ptr() if weights.device.type != "meta" else None
        self.launches: list[str] = []
        self.read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        if not func.is_view and name not in ("detach", "view", "_unsafe_view"):
            self.launches.append(name)
            for each in args:
                if isinstance(each, Tensor) and each.untyped_storage().data_ptr() == self.storage:
                    self.read += out.nbytes if name == "index_select" else each.nbytes
        return out


@pytest.mark.parametrize("resident", [4, 26, 60])
def test_a_step_reads_the_adapters_it_uses_however_many_are_loaded(
    resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    for number in range(resident):
        model.add(f"a{number}", monkeypatch, m0=4, m1=4)
    stacks = model.layers[0].stacks
    assert stacks is not None
    one = stacks.rows[0].nbytes
    scattered, together = ["a0", "a1", "a2", "a3"] * 4, ["a2"] * 8
    for adapters, most in ((scattered, 16 * one), (together, one)):
        with Reads(stacks.rows) as reads:
            model.run(torch.randn(1, len(adapters), IN), adapters)
        assert 0 < reads.read <= most


@pytest.mark.parametrize(("layer", "launches"), [(0, 4), (1, 3)])
def test_launches_of_scattered_adapters_do_not_depend_on_how_many(
    layer: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (4, 26):
        model = Model()
        names = [f"a{number}" for number in range(count)]
        for name in names:
            model.add(name, monkeypatch, m0=4, m1=4, o=4)
        adapters: list[str | None] = [names[number % count] for number in range(32)]
        base = model.layers[layer].base
        x = torch.randn(1, 32, IN)
        stacks = model.layers[layer].stacks
        assert stacks is not None
        with torch.inference_mode(), Reads(stacks.rows) as alone:
            base(x)
        with Reads(stacks.rows) as adapted:
            model.run(x, adapters, layer)
        grouping = 1  # the slots' copy to the device is once a step
        assert len(adapted.launches) - len(alone.launches) - grouping <= launches, adapted.launches


def test_an_unloaded_adapter_gives_back_slots_ranks_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    first, second = model.layers
    weights = {f"a{number}": model.add(f"a{number}", monkeypatch, m0=4) for number in range(9)}
    weights["wide"] = model.add("wide", monkeypatch, m0=64, o=2)
    stacks = first.stacks
    assert stacks is not None
    assert (stacks.slots, stacks.rank) == (12, 64)
    assert second.stacks is not None
    model.store.remove("wide")
    assert second.stacks is None
    assert first.stacks is not None
    assert (first.stacks.slots, first.stacks.rank) == (12, 4)
    for number in range(6):
        model.store.remove(f"a{number}")
    assert first.stacks.slots == 4
    adapters: list[str | None] = ["a6", "a7", None, "a8", "a6"]
    x = torch.randn(1, 5, IN)
    torch.testing.assert_close(
        model.run(x, adapters), updated(model, x, adapters, weights), rtol=1e-4, atol=1e-4
    )
    for number in (6, 7, 8):
        model.store.remove(f"a{number}")
    assert first.stacks is None


def test_the_rows_of_an_unloaded_adapter_are_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    for name in "abc":
        model.add(name, monkeypatch, m0=4, m1=4)
    stacks = model.layers[0].stacks
    assert stacks is not None
    last = stacks.rows[3].clone()
    model.store.remove("a")
    assert torch.equal(stacks.rows[1], last)
    assert not stacks.rows[3].any()
    model.store.remove("b")
    assert [bool(row.any()) for row in stacks.rows] == [False, True, False, False]


def test_adapters_that_come_and_go_within_the_slots_leave_the_weights_where_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model()
    model.add("a", monkeypatch, m0=4)
    layout = model.store.layout
    stacks = model.layers[0].stacks
    model.add("b", monkeypatch, m0=4)
    model.store.remove("a")
    model.add("c", monkeypatch, m0=2)
    assert model.store.layout == layout
    assert model.layers[0].stacks is stacks
    model.add("d", monkeypatch, o=1)
    assert model.store.layout > layout


def test_adapters_that_take_turns_move_nothing_whatever_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    for number in range(16):
        model.add(str(number), monkeypatch, m0=6 if number % 2 else 4)
    layout = model.store.layout
    for turn in range(16, 24):  # 15 of them need fewer slots than 16
        model.store.remove(str(turn - 16))
        model.add(str(turn), monkeypatch, m0=4)
    assert model.store.layout == layout


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_adapter_with_nan_is_refused_by_the_tensor(
    tiny_llama_dir: Path, tmp_path: Path, value: str
) -> None:
    save_adapter(tiny_llama_dir, tmp_path, rank=4, targets=["q_proj"])
    weights = load_file(str(tmp_path / "adapter_model.safetensors"))
    name = next(each for each in weights if "layers.1" in each and "lora_B" in each)
    weights[name][3, 1] = float(value)
    save_file(weights, str(tmp_path / "adapter_model.safetensors"))
    model = Model()
    with pytest.raises(
        ConfigError,
        match=r"adapter x: model\.layers\.1\.self_attn\.q_proj\.lora_B\.weight holds NaN or Inf in 1 of",
    ):
        model.store.read("x", tmp_path, strength=1.0)


def test_weights_that_overflow_in_the_models_type_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    model.store = AdapterStore(
        {"o": LoraTarget(model.layers[1], 0)}, dtype=torch.float16, device=torch.device("cpu")
    )
    monkeypatch.setattr(
        lora, "scaled_pairs", lambda *_, **__: {"o": (torch.ones(2, IN), torch.full((16, 2), 1e5))}
    )
    with pytest.raises(
        ConfigError, match=r"adapter x: .*o\.lora_B times its scaling is not finite in torch.float16"
    ):
        model.store.read("x", Path(), strength=1.0)
