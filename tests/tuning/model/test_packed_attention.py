"""Packed rows do not see each other: losses and gradients are those of separate rows, family by family."""

from typing import Any

import numpy as np
import pytest
import torch

from runtime import families
from runtime.attention import VarlenKernel
from runtime.tuning.data.batching import IGNORE, collate
from runtime.tuning.data.tokenize import TokenizedSequence
from runtime.tuning.loss import batch_loss
from runtime.tuning.model import packed_attention
from runtime.tuning.model.packed_attention import Documents, Rules
from tests.families import PACKED
from tests.host_reads import HostReads
from tests.tuning.tiny_models import some_rows, tiny_model
from tests.varlen_kernels import VarlenKernels


def separate_loss(model: Any, rows: list[TokenizedSequence]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss of each row alone, by transformers itself, and the gradients."""
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(row.loss_mask)[None], ids, IGNORE)
        labels[:, 0] = IGNORE
        count = int((labels != IGNORE).sum())
        if count:
            total = total + model(input_ids=ids, labels=labels, use_cache=False).loss * count
    total.backward()
    return float(total.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", [*PACKED, "falcon"])
def test_packed_and_padded_rows_equal_separate_rows(family: str) -> None:
    model = tiny_model(family, attention="eager")
    model.train(mode=False)
    rows = some_rows(6)
    expected, gradients = separate_loss(model, rows)
    for layout in ("packed", "sorted") if family in PACKED else ("sorted",):
        packed_attention.register()
        model.set_attn_implementation(packed_attention.NAME if layout == "packed" else "sdpa")
        model.zero_grad()
        loss = batch_loss(model, collate(rows, layout, pad_id=0), "cpu")  # type: ignore[arg-type]
        loss.backward()
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=2e-5)
        model.set_attn_implementation("eager")


def test_every_packed_family_was_compared() -> None:
    assert set(PACKED) == {name for name, family in families.FAMILIES.items() if family.packed}


LENGTHS = (9, 1, 30, 4)
KERNELS: tuple[VarlenKernel, ...] = ("flash", "efficient")


def states(heads: int, kv_heads: int, *, head_dim: int = 16) -> list[torch.Tensor]:
    """Return query, key and value (1, heads, T, D) as a layer has them: views of (1, T, heads, D)."""
    torch.manual_seed(0)
    shapes = [(1, sum(LENGTHS), count, head_dim) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rules", [Rules(), Rules(window=6), Rules(scale=0.7, window=1)], ids=str)
def test_one_call_gives_what_one_call_for_each_document_gives(
    kernel: VarlenKernel, kv_heads: int, rules: Rules
) -> None:
    documents = Documents(LENGTHS, packed_attention.borders(LENGTHS))
    found = []
    for one_call in (True, False):
        query, key, value = own = states(4, kv_heads)
        if one_call:
            with VarlenKernels() as kernels:
                flat = (each[0].transpose(0, 1) for each in own)
                out = packed_attention.varlen(*flat, documents=documents, rules=rules, kernel=kernel)[None]
                out.square().sum().backward()
            names = [name for name, *_ in kernels.calls]
            assert names == [f"_{kernel}_attention_forward", f"_{kernel}_attention_backward"]
        else:
            out = packed_attention.each_document(query, key, value, documents=documents, rules=rules)
            out.square().sum().backward()
        found.append([out.detach(), *(each.grad for each in own)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "kernel"),
    [
        ((9, 0), torch.bfloat16, 96, "flash"),
        ((8, 0), torch.float16, 256, "flash"),
        ((8, 0), torch.bfloat16, 512, "efficient"),
        ((9, 0), torch.float32, 64, "efficient"),
        ((7, 0), torch.float16, 80, "efficient"),
        ((7, 5), torch.bfloat16, 64, None),
        ((9, 0), torch.bfloat16, 36, None),
    ],
)
def test_the_kernel_is_one_that_takes_the_heads(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, kernel: str | None,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """On the meta device, where torch has its kernels' shapes; two layers, forward and backward."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    packed_attention._say_once.cache_clear()
    documents = Documents(LENGTHS, packed_attention.borders(LENGTHS).to("meta"))
    with HostReads() as reads, VarlenKernels(compute=False) as kernels:
        for _ in range(2):
            query, key, value = (
                each.detach().to("meta", dtype, non_blocking=True).requires_grad_()
                for each in states(4, 2, head_dim=head_dim)
            )
            out, _ = packed_attention.attention(
                torch.nn.Module(), query, key, value, None, documents=documents
            )
            assert out.shape == (1, sum(LENGTHS), 4, head_dim)
            out.sum().backward()
            assert key.grad is not None
            assert key.grad.shape == key.shape
    names = [name for name, *_ in kernels.calls]
    assert names == [f"_{kernel}_attention_{way}" for way in ("forward", "backward") * 2 if kernel]
    assert reads.found == []
    assert len(caplog.records) == (kernel is None)
