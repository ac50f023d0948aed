"""What one NVIDIA GPU does with this project: QLoRA against the memory plan, decoding against its roofline.

    python tests/bench/gpu.py [--device auto|cuda|cpu] [--shape phi-3-mini|tiny] [--minutes 8]

A model of Phi-3-mini's shape with random weights is made on the spot, so nothing is downloaded. Every
measurement is a process of its own, so that its peak memory is its own; what the minutes do not leave time
for is left out by name. Without a GPU it reports that and exits with 0; `--device cpu --shape tiny` runs the
same code in a minute and proves nothing but that it runs.

QLoRA: a pass of T tokens in four documents, half of each labelled, the trainer's own steps; tokens/s without
the first step; the peak beside the plan's own figure. Decode: prompts of 128 tokens, 64 new ones, greedy, N
at a time; tokens/s once all have begun, with CUDA graphs and ("launched") without. The roofline is one read
of the weights and of the sequences' keys and values per token, at the bandwidth that a copy on this device
reaches.
"batching" is transformers' own continuous batching of such requests, prefill included, and "whole" is ours
measured that way.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "phi-3-mini": {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
}  # fmt: skip
PASSES = {"phi-3-mini": ((1024, False), (2048, False), (2048, True), (4096, True)), "tiny": ((256, True),)}
"""Tokens of a pass, and whether layers are computed again."""
SEQUENCES = {"phi-3-mini": (1, 8, 32, 128), "tiny": (1, 4)}
PROMPT_TOKENS, NEW_TOKENS, STEPS = 128, 64, 5


def machine(device: str) -> Any:
    from runtime import hardware

    found = hardware.detect()
    if device == "cpu" and found.kind != "cpu":
        return hardware.Hardware("cpu", "CPU", None, 8 << 30, 1)
    return found


def make_model(shape: str, device: str, folder: Path) -> None:
    """Write a random model of `shape`, in 16 bits on a GPU, with a tokenizer it does not need."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    from runtime.hardware import compute_dtype

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.conftest import write_tiny_tokenizer

    config = Phi3Config(**SHAPES[shape], max_position_embeddings=4096, pad_token_id=0, eos_token_id=2)
    dtype = getattr(torch, compute_dtype(machine(device)))
    config.dtype = dtype
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if device == "cuda" else "cpu"):
        model = Phi3ForCausalLM(config)
    torch.set_default_dtype(before)
    model.save_pretrained(str(folder), max_shard_size="2GB")
    write_tiny_tokenizer(folder)


def tune(folder: Path, device: str, tokens: int, checkpointing: bool) -> dict[str, Any]:
    """Train STEPS steps of one pass each; return tokens/s, the peak and the plan's own figure."""
    import numpy as np
    import torch
    from transformers import TrainerCallback

    from runtime import hardware, models
    from runtime.memory import tuning
    from runtime.model_source import ModelSource
    from runtime.tuning import fit
    from runtime.tuning.data.tokenize import TokenizedData, TokenizedRow, TokenizedSplit
    from runtime.tuning.precision import resolve_precision
    from runtime.tuning.process.ranks import Ranks
    from runtime.tuning.process.signals import StopSignal
    from runtime.tuning.settings import Output, TuningJob
    from runtime.tuning.train import setup
    from runtime.tuning.train.progress import JobProgress

    here = machine(device)
    draw = np.random.default_rng(0)
    loss_mask = np.arange(tokens // 4) >= tokens // 8
    rows = [
        TokenizedRow(draw.integers(3, 500, tokens // 4, dtype=np.int32), loss_mask) for _ in range(4 * STEPS)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        job = TuningJob(
            name="bench",
            model=ModelSource(name=str(folder), path=folder),
            training={"gradient_checkpointing": checkpointing, "max_steps": STEPS},
            output=Output(folder=Path(scratch)),
            tokens_per_pass=tokens,
            checkpoint_minutes=None,
        )
        planned = fit.plan(job, here, rows=rows)
        parts = tuning.parts(planned.shape, planned.requested)
        job, precision = resolve_precision(job, here)
        rank = setup.RankSetup(here, hardware.device(here), precision, Ranks(), StopSignal(), JobProgress())
        made = setup.prepare(
            job, models.load_tokenizer(job.model), TokenizedSplit(TokenizedData(tuple(rows))), rank=rank
        )
        times: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.monotonic())

        made.trainer.add_callback(Clock())
        setup.run_training(made, folder=Path(scratch) / "checkpoints", fingerprint="bench")
    return {
        "tokens_per_s": tokens * (len(times) - 1) / (times[-1] - times[0]),
        "peak_bytes": peak_bytes(device),
        "planned_bytes": tuning.total(parts) if device == "cuda" else tuning.resident(parts),
    }


def peak_bytes(device: str) -> int:
    """Return the process's peak: what torch reserved and what CUDA itself took, or what was resident."""
    import torch

    from runtime.tuning.train.progress import memory_bytes

    if device != "cuda":
        return memory_bytes()
    free, total = torch.cuda.mem_get_info()
    return int(torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved())


def prompts(count: int, *, seed: int = 0) -> list[list[int]]:
    """Return `count` prompts that no other count or seed has: nothing of them is in a cache."""
    draw = random.Random(1000 * count + seed)
    return [[draw.randrange(3, 500) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def load(folder: Path, device: str) -> Any:
    from runtime import hardware, models
    from runtime.model_source import ModelSource

    here = machine(device)
    source = ModelSource(name=str(folder), path=folder)
    return models.load(source, hardware=here, device=hardware.device(here))


def decode(folder: Path, device: str, counts: Iterable[int], graphs: bool) -> dict[str, Any]:
    """Return tokens/s of our engine at each number of sequences, CUDA graphs or none, and the roofline's."""
    from runtime.model_source import ModelSource
    from runtime.serving.engine.create import create
    from runtime.serving.engine.protocol import Request, Sampling
    from runtime.serving.settings import Limits, ServeConfig

    model = load(folder, device)
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    size = model.config
    head = size.hidden_size // size.num_attention_heads
    token = 2 * size.num_hidden_layers * size.num_key_value_heads * head * model.dtype.itemsize
    speed = bandwidth(device)
    limits = Limits(rows=max(counts), context_tokens=PROMPT_TOKENS + NEW_TOKENS, queue=max(counts))
    source = ModelSource(name=str(folder), path=folder)
    config = ServeConfig(
        model=source, served_name="m", limits=limits, speculative_tokens=0, cuda_graphs=graphs
    )
    running = create(config, model)

    async def ask(prompt: list[int], times: list[float]) -> None:
        sampling = Sampling(max_new_tokens=NEW_TOKENS)
        async for token in running.submit(Request(tuple(prompt), sampling, id=str(id(times)))):
            if token.id is not None:
                times.append(time.monotonic())  # noqa: PERF401 - as they come

    async def all_at_once(count: int, seed: int) -> dict[str, float]:
        times: list[list[float]] = [[] for _ in range(count)]
        begun = time.monotonic()
        await asyncio.gather(*(ask(*pair) for pair in zip(prompts(count, seed=seed), times, strict=True)))
        ended, started = max(each[-1] for each in times), max(each[0] for each in times)
        after = sum(stamp > started for each in times for stamp in each)
        needed = weights + count * token * (PROMPT_TOKENS + NEW_TOKENS // 2)
        return {
            "tokens_per_s": after / max(ended - started, 1e-9),
            "whole_tokens_per_s": sum(map(len, times)) / (ended - begun),
            "roofline_tokens_per_s": count * speed / needed,
        }

    try:
        for count in counts:
            asyncio.run(all_at_once(count, 1))  # allocates, records
        return {"bandwidth": speed} | {str(count): asyncio.run(all_at_once(count, 0)) for count in counts}
    finally:
        running.close()


def batching(folder: Path, device: str, counts: Iterable[int]) -> dict[str, Any]:
    """Return tokens/s of transformers' continuous batching at each number of requests."""
    from transformers import GenerationConfig

    model = load(folder, device)
    model.set_attn_implementation("paged|sdpa")
    options = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def at_once(count: int) -> dict[str, float]:
        began = time.monotonic()
        made = model.generate_batch(prompts(count), generation_config=options)
        tokens = sum(len(each.generated_tokens) for each in made.values())
        return {"whole_tokens_per_s": tokens / (time.monotonic() - began)}

    at_once(1)
    return {str(count): at_once(count) for count in counts}


def bandwidth(device: str) -> float:
    """Return the bytes per second that a copy on the device reads and writes, the best of five."""
    import torch

    size = 1 << 30 if device == "cuda" else 1 << 26
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.monotonic()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - began)
    return 2 * size / best


def child(words: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run one measurement in a process of its own; a failure or no time left is an answer too."""
    if seconds < 5:
        return {"error": "no time left"}
    command = [sys.executable, __file__, "--child", json.dumps(words)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["ended without an error message"])[-1][:160]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run_child(words: dict[str, Any]) -> None:
    work: dict[str, Callable[..., Any]] = {
        "make": make_model, "tune": tune, "decode": decode, "batching": batching
    }  # fmt: skip
    given = {key: Path(value) if key == "folder" else value for key, value in words.items() if key != "work"}
    print(json.dumps(work[words["work"]](**given)))


def show(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    lines = [columns, *(tuple(f"{c:.2f}" if isinstance(c, float) else str(c) for c in row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)
    print()


def measure(shape: str, device: str, minutes: float) -> bool:
    """Measure and print everything; return whether nothing failed."""
    deadline = time.monotonic() + 60 * minutes
    whole = True
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch:
        common = {"folder": f"{scratch}/model", "device": device}

        def left() -> float:
            return deadline - time.monotonic()

        made = child({"work": "make", "shape": shape, **common}, left()) or {}
        if "error" in made:
            print(f"no model: {made['error']}")
            return False
        rows: list[tuple[Any, ...]] = []
        for tokens, again in PASSES[shape]:
            got = child({"work": "tune", "tokens": tokens, "checkpointing": again, **common}, left())
            whole &= "error" not in got
            name = (tokens, "yes" if again else "no")
            rows.append(
                (*name, got["error"], "", "", "") if "error" in got else
                (*name, got["tokens_per_s"], got["peak_bytes"] / 2**30, got["planned_bytes"] / 2**30,
                 got["planned_bytes"] / got["peak_bytes"])
            )  # fmt: skip
        show(("QLoRA tokens", "recomputed", "tokens/s", "peak GiB", "plan GiB", "plan/peak"), rows)
        ours = child({"work": "decode", "counts": SEQUENCES[shape], "graphs": True, **common}, left())
        bare = child({"work": "decode", "counts": SEQUENCES[shape], "graphs": False, **common}, left())
        theirs = child({"work": "batching", "counts": SEQUENCES[shape], **common}, left())
        whole &= "error" not in ours
        for name, got in (("ours", ours), ("launched", bare), ("batching", theirs)):
            if "error" in got:
                print(f"{name}: {got['error']}")
        show(
            ("sequences", "tokens/s", "launched", "roofline", "share", "whole", "batching"),
            [
                (count, here["tokens_per_s"], bare.get(str(count), {}).get("tokens_per_s", "-"),
                 here["roofline_tokens_per_s"],
                 here["tokens_per_s"] / here["roofline_tokens_per_s"], here["whole_tokens_per_s"],
                 theirs.get(str(count), {}).get("whole_tokens_per_s", "-"))
                for count in SEQUENCES[shape] if (here := ours.get(str(count)))
            ],
        )  # fmt: skip
        if "bandwidth" in ours:
            print(f"bandwidth of a copy: {ours['bandwidth'] / 1e9:.0f} GB/s")
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="phi-3-mini")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run_child(given.child)
        return 0
    here = machine(given.device)
    if given.device != "cpu" and here.kind == "cpu":
        print("no NVIDIA GPU here: nothing was measured")
        return 0
    print(f"{here.name}, {here.memory_bytes / 2**30:.1f} GiB; {given.shape} with random weights\n")
    return 0 if measure(given.shape, here.kind, given.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
