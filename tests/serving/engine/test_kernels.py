"""The compiled kernels compute what torch's operations do, on each kind of processor they are built for."""

import dataclasses
import math
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from runtime.serving.engine import kernels
from runtime.serving.engine.attention import attend
from runtime.serving.engine.kernels import LIBRARY, Kernels, checksum
from runtime.serving.engine.kv_pool import store
from runtime.serving.engine.layers import rotate
from tests.families import SERVED, model_of
from tests.serving.engine.attention_steps import Run, Step
from tests.serving.engine.calls import generate, make_request, run
from tests.serving.engine.models import some_prompts

SOURCES = sorted(LIBRARY.parent.glob("*.c"))
PROCESSORS = {"x86-64-v4": ["avx512f", "avx512bw", "avx512vl"], "x86-64-v3": ["avx2", "fma"], "x86-64": []}
"""What -march calls them, and the flags in /proc/cpuinfo of one that can run it."""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(scope="module", params=["as built", *PROCESSORS])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The library as it is installed, and one for each kind of processor that this one can be."""
    library = LIBRARY
    if request.param in PROCESSORS:
        if platform.machine() != "x86_64":
            pytest.skip("one kind of processor only")
        flags = Path("/proc/cpuinfo").read_text().split()
        if any(flag not in flags for flag in PROCESSORS[request.param]):
            pytest.skip(f"this processor is no {request.param}")
        library = tmp_path_factory.mktemp("kernels") / "libkernels.so"
        command = [
            "cc",
            "-O2",
            "-ftree-vectorize",
            "-fPIC",
            "-shared",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-psabi",
        ]
        command += [
            "-DKERNEL=void",
            f"-DBUILT_FROM={checksum()}",
            f"-march={request.param}",
            "-o",
            str(library),
            *map(str, SOURCES),
            "-lm",
        ]
        subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LIBRARY", library)
        patch.setattr(kernels, "SMALL", 1 << 10)  # so that some run in several threads, and some do not
        found = Kernels.find()
        assert found is not None, "was built when the project was installed"
        yield found


def both(native: Kernels, compute: Callable[[Step], Tensor], **how: Any) -> tuple[Tensor, Tensor]:
    """Return what the kernels and what torch's operations make of a step of three sequences and a chunk."""
    return compute(Step("compiled", native=native, runs=RUNS, **how)), compute(
        Step("plain", runs=RUNS, **how)
    )


RUNS = (Run(700, 1), Run(300, 201), Run(20, 64), Run(100, 12, 5))


@pytest.mark.parametrize("window", [None, 16, 64])
@pytest.mark.parametrize(
    ("group", "kv_heads", "dim"),
    [
        (3, 3, 64),
        (1, 4, 96),
        (4, 2, 128),
        (8, 1, 128),
        (7, 2, 64),
        (71, 1, 64),
        (2, 2, 16),
        (5, 1, 256),
        (1, 1, 80),
    ],
)
def test_attention_sees_what_torchs_sees(
    native: Kernels, group: int, kv_heads: int, dim: int, window: int | None
) -> None:
    heads = (group * kv_heads, kv_heads, dim)
    found, expected = both(native, Step.attend, window=window, heads=heads)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


def test_attention_of_large_scores_and_of_an_infinite_one(native: Kernels) -> None:
    def compute(step: Step) -> Tensor:
        step.query *= 1000
        return step.attend()

    found, expected = both(native, compute)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def infinite(step: Step) -> Tensor:
        step.query[1, 2, 5] = torch.inf
        return step.attend()

    found, expected = both(native, infinite)
    assert found[1, 2].isnan().all()
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("window", [None, 3, 16, 64, 100])
@pytest.mark.parametrize("start", [0, 5, 130])
@pytest.mark.parametrize("tokens", [2, 16, 17, 70])
def test_a_chunk_sees_its_range_up_to_each_token(
    native: Kernels, tokens: int, start: int, window: int | None
) -> None:
    how: dict[str, Any] = {"window": window, "heads": (6, 2, 64), "runs": (Run(211, start + tokens, tokens),)}
    found, expected = (
        step.attend() for step in (Step("compiled", native=native, **how), Step("plain", **how))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("heads_first", [True, False])
def test_keys_may_lie_head_after_head_or_position_after_position(native: Kernels, heads_first: bool) -> None:
    step = Step("compiled", native=native, runs=RUNS)
    expected = step.attend()
    states = [
        each.transpose(0, 1).contiguous().transpose(0, 1) if heads_first else each.contiguous()
        for each in (step.keys, step.values)
    ]
    kernel = native.attention(*states, scaling=step.layer.scaling, window=None)
    layer = dataclasses.replace(step.layer, keys=states[0], values=states[1], kernel=kernel)
    assert torch.equal(attend(step.query, layer, step.batch), expected)


@pytest.mark.parametrize("position", [300, 400, 500])
def test_a_sequence_with_nan_in_its_range_shows_it_and_the_others_do_not(
    native: Kernels, position: int
) -> None:
    def compute(step: Step) -> Tensor:
        step.keys[position, 1, 3] = torch.nan
        return step.attend()

    found, expected = both(native, compute)
    assert found[1, 2:].isnan().all()
    assert found.isnan().sum() == found[1, 2:].numel()
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("rotary_dim", [64, 32, 20])
def test_queries_are_rotated_and_keys_and_values_stored(native: Kernels, rotary_dim: int) -> None:
    new, old = Step("compiled", native=native, runs=RUNS), Step("plain", runs=RUNS)
    qkv = torch.randn(8, 4 + 2 + 2, 64)
    cos_sin = torch.randn(1, 8, rotary_dim), torch.randn(1, 8, rotary_dim)
    own = qkv.clone()
    kernel = new.layer.kernel
    assert kernel is not None
    kernel.rotate(own, cos_sin, stores=new.batch.ranges[0].stores)
    expected = rotate(qkv[:, :6], *cos_sin)
    store(old.keys, expected[:, 4:], old.batch, kind=0)
    store(old.values, qkv[:, 6:], old.batch, kind=0)
    torch.testing.assert_close(own[:, :4], expected[:, :4])
    torch.testing.assert_close(new.keys, old.keys, equal_nan=True)
    torch.testing.assert_close(new.values, old.values, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "outs"), [(16, 5), (48, 960), (576, 33), (1536, 64)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_a_product_with_few_tokens(native: Kernels, tokens: int, size: int, outs: int, bias: bool) -> None:
    x, weight = torch.randn(1, tokens, size), torch.randn(outs, size) / size**0.5
    added = torch.randn(outs) if bias else None
    found = native.multiply(x, weight, added)
    torch.testing.assert_close(found, linear(x, weight, added), rtol=1e-5, atol=1e-5)
    x[0, 0, 3] = torch.nan
    assert native.multiply(x, weight, added).isnan().sum() == outs


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("size", [16, 576, 1000 // 16 * 16])
def test_norm_adds_the_update_and_scales(native: Kernels, tokens: int, size: int) -> None:
    hidden, update, weight = torch.randn(1, tokens, size), torch.randn(1, tokens, size), torch.randn(size)
    changed = hidden.clone()
    alone, added = native.norm(hidden, None, weight, 1e-5), native.norm(changed, update, weight, 1e-5)
    torch.testing.assert_close(alone, rms_norm(hidden, (size,), weight, 1e-5))
    torch.testing.assert_close(changed, hidden + update)
    torch.testing.assert_close(added, rms_norm(hidden + update, (size,), weight, 1e-5))
    hidden[0, 0, 7] = torch.nan
    out = native.norm(hidden, None, weight, 1e-5)
    assert out[0, 0].isnan().all()
    assert not out[0, 1:].isnan().any()


@pytest.mark.parametrize("tokens", [1, 9])
def test_gate_is_silu_of_one_half_times_the_other(native: Kernels, tokens: int) -> None:
    mixed = torch.randn(1, tokens, 2 * 160) * 8
    mixed[0, 0, :8] = torch.tensor([0.0, -0.0, 88, -88, 200, -200, 1e30, -1e30])
    out = native.gate(mixed)
    torch.testing.assert_close(out, silu(mixed[..., :160]) * mixed[..., 160:])
    mixed[0, 0, 3], mixed[0, 0, 4] = torch.nan, torch.inf
    out, expected = native.gate(mixed), silu(mixed[..., :160]) * mixed[..., 160:]
    assert torch.equal(out.isfinite(), expected.isfinite())


@pytest.mark.parametrize("family", SERVED)
def test_without_kernels_the_answers_are_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With them test_engine.py covers it; here torch's operations answer, as where there was no compiler."""
    from runtime.serving.engine.engine import BatchingEngine, EngineLimits

    monkeypatch.setattr(Kernels, "find", lambda: None)
    model = model_of(family)
    prompts = some_prompts(3, 40, 1, 70)
    expected = [generate(model, prompt) for prompt in prompts]
    engine = BatchingEngine(model, EngineLimits(max_sequences=4, context_tokens=200, max_waiting=8))
    requests = [make_request(prompt, id=str(n)) for n, prompt in enumerate(prompts)]
    answers = [ids for ids, _ in run(engine, *requests)]
    engine.close()
    assert answers == expected
    assert "Without compiled kernels, serving on a CPU is slower" in caplog.text


@pytest.mark.parametrize("broken", ["no library", "no threads", "older than its sources"])
def test_what_is_missing_is_no_failure(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if broken == "no library":
        monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "libkernels.so")
    elif broken == "no threads":
        monkeypatch.setattr(kernels, "PARALLEL", "GOMP_unknown")
    else:
        monkeypatch.setattr(kernels, "checksum", lambda: 1)
    assert Kernels.find() is None


def test_exponentials_are_right_to_two_units_of_the_last_place(native: Kernels) -> None:
    """silu(x) * 1 is x / (1 + e^-x): what is left of it near the ends shows the exponential itself."""
    gates = torch.linspace(-86, 86, 16 * 4000, dtype=torch.float64)
    mixed = torch.cat((gates.float(), torch.ones(len(gates))))[None]
    exact = gates.float().double() * torch.sigmoid(gates.float().double())
    error = (native.gate(mixed)[0].double() - exact).abs() / exact.abs().clamp(min=1e-300)
    assert error[gates != 0].max() < 4 * math.ldexp(1, -23)
