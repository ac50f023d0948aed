"""Which kernel attention takes: never cuDNN's, and on a GPU never the one that writes all weights out."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime.attention import match_heads
from runtime.tuning.data.batching import collate
from runtime.tuning.loss import batch_loss
from runtime.tuning.model import packed_attention
from tests.families import PACKED, config_of
from tests.host_reads import HostReads
from tests.tuning.conftest import Worker, tiny_job, write_rows
from tests.tuning.tiny_models import some_rows, tiny_model
from tests.varlen_kernels import VarlenKernels


class Calls(TorchFunctionMode):
    """Notes what SDPA is called with: (query heads, key-value heads, whether they are grouped, masked)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int, bool, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            query, key, value = args
            assert key.shape[1] == value.shape[1]
            grouped, masked = bool(kwargs.get("enable_gqa")), kwargs.get("attn_mask") is not None
            self.found.append((query.shape[1], key.shape[1], grouped, masked))
        return func(*args, **kwargs)

    def check(self) -> None:
        """No call groups heads under a mask: only the kernel that writes T x L weights takes both."""
        assert self.found
        assert not [call for call in self.found if call[2] and call[3]]
        assert all(heads == kv_heads for heads, kv_heads, grouped, _ in self.found if not grouped)


@pytest.mark.parametrize("capability", [(7, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_on_a_gpu_are_one_call_a_layer(
    family: str, monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int]
) -> None:
    """By the kernel for float16 of each GPU, whatever the number of rows; never SDPA, which would choose."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    packed_attention.register()
    model = tiny_model(family, attention=packed_attention.NAME).to("meta", torch.float16)
    name = "_flash_attention_forward" if capability >= (8, 0) else "_efficient_attention_forward"
    for rows in (1, 6):
        calls, kernels = Calls(), VarlenKernels(compute=False)
        with calls, HostReads() as reads, kernels:
            batch_loss(model, collate(some_rows(rows), "packed", pad_id=0), "meta")
        assert not calls.found
        assert [each for each, *_ in kernels.calls] == [name] * model.config.num_hidden_layers
        assert not reads.found


@pytest.mark.parametrize("flash", [False, True], ids=["", "flash"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_without_a_kernel_for_them_have_no_mask_with_grouped_heads(
    family: str, monkeypatch: pytest.MonkeyPatch, *, flash: bool
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: flash)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))  # and bfloat16
    packed_attention.register()
    model = tiny_model(family, attention=packed_attention.NAME).to("meta", torch.bfloat16)
    calls = Calls()
    with calls, HostReads():
        batch_loss(model, collate(some_rows(6), "packed", pad_id=0), "meta")
    calls.check()
    windows_everywhere = family in ("mistral", "phi3")
    assert any(grouped for *_, grouped, _ in calls.found) == (flash and not windows_everywhere)


def test_repeated_heads_give_what_grouped_heads_give() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    assert match_heads(query, key, value, masked=True)[0] is key, "a CPU takes groups"
    on_gpu = match_heads(query.to("meta"), key, value, masked=True)
    torch.testing.assert_close(scaled_dot_product_attention(query, *on_gpu, attn_mask=mask), expected)


PROBE = """
import os, pathlib, sys
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

def note(*_):
    handle.remove()
    state = "cuDNN" if torch.backends.cuda.cudnn_sdp_enabled() else "no cuDNN"
    file = pathlib.Path(os.environ["PROBED"], str(os.getpid()))
    file.write_text(f"{state}: {' '.join(sys.orig_argv[1:3])}")

handle = register_module_forward_pre_hook(note)
"""
"""In every Python process: notes whether cuDNN's attention is on when its first module runs."""


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which each process that runs a model leaves a file."""
    library, notes = tmp_path / "library", tmp_path / "notes"
    for folder in (library, notes):
        folder.mkdir()
    (library / "sitecustomize.py").write_text(PROBE)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(library), *inherited))))
    monkeypatch.setenv("PROBED", str(notes))
    return notes


def notes_in(folder: Path) -> list[str]:
    return sorted(file.read_text() for file in folder.iterdir())


def check_server(*arguments: str) -> None:
    command = [sys.executable, "-m", "runtime", "serve", *arguments, "--check"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@pytest.mark.slow
def test_no_tuning_worker_attends_with_cudnn(tiny_llama_dir: Path, tmp_path: Path, probed: Path) -> None:
    write_rows(tmp_path / "rows" / "rows.parquet", 8)
    job = tiny_job(tiny_llama_dir, tmp_path / "rows", tmp_path / "out", training={"max_steps": 1})
    worker = Worker(job)
    assert worker.wait() == 0, worker.output()
    assert notes_in(probed) == ["no cuDNN: -m runtime.tuning"]


@pytest.mark.slow
def test_no_engine_and_no_rank_attends_with_cudnn(tiny_llama_dir: Path, tmp_path: Path, probed: Path) -> None:
    check_server(str(tiny_llama_dir), "--parallel", "tp", "--processes", "2")
    ranks = ["no cuDNN: -m runtime", "no cuDNN: -m runtime.serving.engine.parallel.worker"]
    assert notes_in(probed) == ranks
    other = tmp_path / "gpt_neox"  # one request at a time
    AutoModelForCausalLM.from_config(config_of("gpt_neox", vocab_size=512)).save_pretrained(other)
    AutoTokenizer.from_pretrained(str(tiny_llama_dir)).save_pretrained(other)
    check_server(str(other))
    assert notes_in(probed) == sorted([*ranks, ranks[0]])


def test_whatever_loads_a_model_to_run_it_turns_cudnn_off() -> None:
    """A further module that loads one belongs to a process of the tests above, or gets its own."""
    root = Path(__file__).parents[1]
    loading = set()
    for path in (root / "runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("models.load", "shard.load"):
                loading.add(".".join(path.relative_to(root).with_suffix("").parts))
    assert loading == {
        "runtime.merge",  # adds matrices, runs nothing
        "runtime.serving.engine.parallel.worker",
        "runtime.serving.loading",
        "runtime.tuning.train.setup",
    }
