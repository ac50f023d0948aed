"""Each form of attention sees the ranges of a step and nothing else, and asks the device for no number."""

import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from runtime.memory.pool import PoolSize
from runtime.serving.engine.attention_forms import choose
from runtime.serving.engine.batch import Form, HostBatch, HostRanges
from runtime.serving.engine.kernels import Kernels
from runtime.serving.engine.kv_pool import LayerKinds
from runtime.serving.engine.model_runner import ModelRunner
from tests.families import SERVED, config_of, model_of
from tests.host_reads import HostReads
from tests.serving.engine.attention_steps import CHUNKS, DECODES, GpuKernels, Run, Step, exact

V100, A10, H200 = (7, 0), (8, 6), (9, 0)
FORMS: list[Form] = ["varlen", "efficient", "compiled", "plain"]
HEADS = [(9, 3, 64), (4, 4, 96), (32, 8, 16), (14, 2, 64), (12, 1, 32), (4, 2, 256)]


def found(form: Form, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of a step by `form`, and the exact one."""
    native = Kernels.find()
    if form == "compiled" and native is None:
        pytest.skip("no compiled kernels here")
    step = Step(form, native=native, **how)
    with GpuKernels():
        return step.attend().double(), exact(step)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("runs", [DECODES, CHUNKS, (*DECODES, *CHUNKS)], ids=["decode", "chunks", "both"])
@pytest.mark.parametrize("window", [None, 16, 100])
@pytest.mark.parametrize("heads", HEADS)
def test_a_form_sees_what_it_should(
    form: Form, runs: tuple[Run, ...], window: int | None, heads: tuple[int, int, int]
) -> None:
    out, expected = found(form, runs=runs, window=window, heads=heads)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(
    "rules", [{"sinks": torch.linspace(-3, 9, 8)}, {"softcap": 3.0}], ids=["sinks", "cap"]
)
def test_sinks_and_capped_scores(form: Form, window: int | None, rules: dict[str, Any]) -> None:
    out, expected = found(form, heads=(8, 2, 64), window=window, **rules)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["varlen", "efficient", "plain"])
def test_two_bytes_a_number(form: Form) -> None:
    out, expected = found(form, dtype=torch.bfloat16, sinks=torch.ones(4) if form == "varlen" else None)
    torch.testing.assert_close(out, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("form", ["varlen", "efficient"])
def test_decoding_sequences_and_chunks_have_calls_of_their_own(form: Form) -> None:
    """FlashAttention 2 reads keys once a group, and splits contexts, for one query without a window."""
    with GpuKernels() as kernels:
        Step(form, heads=(8, 2, 64), window=16).attend()
    few = [("flash", 1), ("flash", 17)]
    assert kernels.calls == (few if form == "varlen" else [("efficient", 4), *[("efficient", 17)] * 2])


@pytest.mark.parametrize(
    ("heads", "calls"), [((8, 8, 64), 1), ((32, 8, 64), 4), ((28, 4, 64), 4), ((71, 1, 64), 1)]
)
def test_the_efficient_kernel_has_few_calls_a_chunk(heads: tuple[int, int, int], calls: int) -> None:
    with GpuKernels() as kernels:
        Step("efficient", heads=heads, runs=CHUNKS).attend()
    assert len(kernels.calls) == calls


@pytest.mark.parametrize("form", ["varlen", "efficient"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_own_operators_take_the_arguments(form: Form, dtype: torch.dtype) -> None:
    """On the meta device they run as installed: names, types, and the shape of what they return."""
    with HostReads() as reads:
        step = Step(form, heads=(28, 4, 128), dtype=dtype, device=torch.device("meta"), window=16,
                    sinks=torch.ones(28, device="meta") if form == "varlen" else None)  # fmt: skip
        del reads.found[:]
        out = step.attend()
    assert reads.found == []
    assert (out.shape, out.dtype) == (step.query.shape, dtype)


class Operations(TorchDispatchMode):
    """Within: operations that write memory are counted by name; each is one kernel on a GPU, mostly."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.most = 0
        """Numbers of the largest new tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        first = out[0] if isinstance(out, tuple) else out
        given = {each.untyped_storage()._cdata for each in args if isinstance(each, torch.Tensor)}
        if not isinstance(first, torch.Tensor) or name in ("empty", "empty_like", "detach_"):
            return out
        if new := first.untyped_storage()._cdata not in given:
            self.most = max(self.most, first.untyped_storage().nbytes() // first.itemsize)
        self.found[name] += new or name.endswith("_")
        return out


@pytest.mark.parametrize("form", ["varlen", "efficient"])
@pytest.mark.parametrize("heads", HEADS)
def test_no_key_is_copied(form: Form, heads: tuple[int, int, int]) -> None:
    step = Step(form, heads=heads, device=torch.device("meta"), dtype=torch.float16, window=16)
    with Operations() as made:
        step.attend()
    assert made.most <= step.query.numel()


def host_step(counts: list[int], kinds: int = 1) -> HostBatch:
    """Return a step of sequences with so many tokens each."""
    tokens = sum(counts)
    ranges = HostRanges([100 * each for each in range(len(counts))], [20] * len(counts))
    return HostBatch(
        ids=[5] * tokens, positions=[3] * tokens, decode_tokens=counts.count(1), counts=counts,
        ranges=(ranges,) * kinds, logit_indices=[0], adapters=[None] * tokens, long=[False] * tokens,
    )  # fmt: skip


def launched(capability: tuple[int, int], counts: list[int]) -> tuple[Operations, HostReads]:
    """Return what a layer of a Llama launches in a step of sequences with so many tokens each."""
    totals = []
    for layers in (1, 2):
        config = config_of("llama", num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2)
        dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
        model = AutoModelForCausalLM.from_config(config).to("meta", dtype)
        runner = ModelRunner(model, PoolSize(4, 100, (400,)), capability=capability)
        with HostReads() as reads, Operations() as launches:
            runner._execute(host_step(counts))
        totals.append((launches, reads))
    (one, _), (two, reads) = totals
    two.found.subtract(one.found)
    return two, reads


@pytest.mark.parametrize("capability", [V100, H200], ids=["V100", "H200"])
@pytest.mark.parametrize("family", SERVED)
def test_no_family_waits_for_the_device(family: str, capability: tuple[int, int]) -> None:
    model = model_of(family).to("meta", torch.float16)
    kinds = len(LayerKinds.of(model.config).kinds)
    runner = ModelRunner(model, PoolSize(4, 100, (400,) * kinds), capability=capability)
    with HostReads() as reads, Operations() as operations:
        runner._execute(host_step([1, 1, 8, 5], kinds))
    assert reads.found == []
    kernel = "_flash_attention_forward" if capability == H200 else "_efficient_attention_forward"
    assert (kernel in operations.found) == (family != "gemma2")


@pytest.mark.parametrize(
    ("capability", "counts", "most"),
    [
        (H200, [1, 1, 1], 16),
        (H200, [8], 16),
        (H200, [1, 1, 8, 5], 18),
        (V100, [1, 1, 1], 18),
        (V100, [8], 18),
        (V100, [1, 1, 8, 5], 22),
    ],
)
def test_launches_of_a_layer(capability: tuple[int, int], counts: list[int], most: int) -> None:
    """RESULTS.md has them; of 2 groups of 4 heads the efficient kernel takes one a call."""
    launches, reads = launched(capability, counts)
    assert reads.found == []
    assert launches.found.total() == most, +launches.found


def config(**numbers: Any) -> Any:
    text = SimpleNamespace(**numbers)
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "capped", "expected", "said"),
    [
        (H200, torch.bfloat16, 96, False, "varlen", "FlashAttention 2"),
        (A10, torch.float16, 256, False, "varlen", "FlashAttention 2"),
        (A10, torch.bfloat16, 512, False, "efficient", "FlashAttention takes heads up to 256, not 512"),
        (H200, torch.float32, 64, False, "efficient", "FlashAttention takes two-byte numbers, not float32"),
        (V100, torch.float16, 128, False, "efficient", "the memory-efficient kernel"),
        (V100, torch.float16, 20, False, "plain", "a head of 20 numbers is not a multiple of 16 bytes"),
        (H200, torch.bfloat16, 256, True, "plain", "no kernel squeezes scores as this model does"),
        (None, torch.float32, 64, False, "compiled", "compiled kernels"),
        (None, torch.bfloat16, 64, False, "plain", "plain torch operations"),
    ],
)
def test_the_form_follows_from_the_hardware_and_the_model(
    capability: tuple[int, int] | None, dtype: torch.dtype, dim: int, capped: bool, expected: Form, said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    kernels = Kernels.find() if expected == "compiled" else None
    if expected == "compiled" and kernels is None:
        pytest.skip("no compiled kernels here")
    model = config(attn_logit_softcapping=50.0) if capped else config()
    with caplog.at_level(logging.INFO):
        assert choose(model, dtype, dims=(dim, 64), capability=capability, kernels=kernels) == expected
    assert said in caplog.text
