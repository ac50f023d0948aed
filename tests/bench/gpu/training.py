"""One optimizer step of the tuner's own trainer on a tiny model, and the same by plain peft in float32.

Start at `compare`.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from runtime import hardware, models
from runtime.model_source import Dtype, ModelSource, Quantization
from runtime.tuning.data.batching import IGNORE
from runtime.tuning.data.tokenize import TokenizedData, TokenizedSequence, TokenizedSplit
from runtime.tuning.identity import JobIdentity
from runtime.tuning.precision import resolve_precision
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.settings import Lora, Output, TuningJob
from runtime.tuning.train import setup
from runtime.tuning.train.progress import JobProgress
from tests.bench.gpu.models import ORIGINAL_TOKENS, tiny
from tests.bench.gpu.step import Context, Figures
from tests.conftest import write_tiny_tokenizer

MOST_ERROR = 0.02
"""Of the norm of all gradients together, and of the loss."""
ROW_TOKENS = (70, 96, 131, 200)
"""All longer than ORIGINAL_TOKENS: a pack has one set of rotary factors for all its rows."""
MOST_STEPS = 20
"""The loss scaler begins at 2**16 and skips steps until its scale fits."""


@dataclass(frozen=True, slots=True)
class TrainingCase:
    """What is trained, and how."""

    model: str
    bits: Literal[4] | None = 4
    """Not 8: its products round the inputs too, which the reference does not."""
    dtype: Dtype = "auto"
    checkpointing: bool = False

    @property
    def name(self) -> str:
        weights = {4: "NF4", None: "whole"}[self.bits]
        again = ", checkpointing" if self.checkpointing else ""
        return f"{self.model} {weights} {self.dtype}{again}"


class LastStep(TrainerCallback):
    """Keeps the loss and the unscaled gradients of the first step whose gradients are finite."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.loss, self.skipped = float("nan"), 0
        self.gradients: dict[str, torch.Tensor] = {}
        trained = trainer.training_step

        def training_step(*arguments: Any, **named: Any) -> torch.Tensor:
            result: torch.Tensor = trained(*arguments, **named)
            self.loss = float(result)
            return result

        trainer.training_step = training_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        found = {
            name: parameter.grad.float().cpu()
            for name, parameter in self.trainer.model.named_parameters()
            if parameter.grad is not None
        }
        if all(bool(gradient.isfinite().all()) for gradient in found.values()):
            self.gradients = found
        else:
            self.skipped += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= bool(self.gradients)


def compare(context: Context, case: TrainingCase) -> Figures:
    """Return by how much the tuner's loss and gradients differ from the reference's."""
    assert min(ROW_TOKENS) > ORIGINAL_TOKENS
    folder = context.scratch / f"tiny-{case.model}"
    if not folder.exists():
        tiny(case.model).save_pretrained(str(folder))
        write_tiny_tokenizer(folder)
    rows = _rows()
    with tempfile.TemporaryDirectory(dir=context.scratch) as out:
        made = _prepared(context, case, rows, folder=folder, out=Path(out))
        with torch.no_grad():
            for name, parameter in made.model.named_parameters():
                if "lora_B" in name:  # zero at first, and the gradient of the other matrix with it
                    parameter.normal_(std=0.05)
        reference = _reference(made.model, folder)
        step = LastStep(made.trainer)
        made.trainer.add_callback(step)
        setup.run_training(made, folder=Path(out) / "checkpoints", owner=JobIdentity({}))
    loss, gradients = _by_rows(reference, rows)
    figures = {"dtype": str(made.rank.precision.dtype), "skipped_steps": step.skipped, "loss": step.loss}
    return figures | errors(step, loss, gradients)


def _rows() -> tuple[TokenizedSequence, ...]:
    draw = np.random.default_rng(1)
    return tuple(
        TokenizedSequence(draw.integers(3, 128, count).astype(np.int32), draw.random(count) < 0.5)
        for count in ROW_TOKENS
    )


def _prepared(
    context: Context, case: TrainingCase, rows: tuple[TokenizedSequence, ...], *, folder: Path, out: Path
) -> setup.TrainingSetup:
    job = TuningJob(
        name="bench",
        model=ModelSource(name=str(folder), path=folder, dtype=case.dtype),
        method="lora" if case.bits is None else "qlora",
        quantization=None if case.bits is None else Quantization(bits=case.bits),
        lora=Lora(r=8),
        training={
            "max_steps": MOST_STEPS, "max_grad_norm": 1e9, "learning_rate": 0.0,
            "per_device_train_batch_size": len(rows), "gradient_checkpointing": case.checkpointing,
        },
        output=Output(folder=out),
        tokens_per_pass=sum(map(len, rows)),
        checkpoint_minutes=None,
    )  # fmt: skip
    machine = context.machine
    job, precision = resolve_precision(job, machine)
    rank = setup.RankSetup(machine, hardware.device(machine), precision, Ranks(), StopSignal(), JobProgress())
    tokenizer = models.load_tokenizer(job.model)
    return setup.prepare(job, tokenizer, TokenizedSplit(TokenizedData(rows)), rank=rank)


def _reference(model: Any, folder: Path) -> Any:
    """Return the base model under plain peft in float32 on the CPU, with the weights of `model`."""
    from peft import get_peft_model

    base = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager")
    reference = get_peft_model(base, model.peft_config["default"])
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, module in reference.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None:
                weight.copy_(_whole(modules[name].weight))
    return reference.eval()


def _whole(weight: Any) -> torch.Tensor:
    """Return a weight as float32 on the CPU, a quantised one dequantised."""
    from bitsandbytes import functional

    if (state := getattr(weight, "quant_state", None)) is not None:
        weight = functional.dequantize_4bit(weight.data, state)
    return weight.detach().float().cpu()  # type: ignore[no-any-return]


def _by_rows(model: Any, rows: tuple[TokenizedSequence, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss per labelled token and its gradients, each row alone."""
    total = sum(row.labelled_tokens for row in rows)
    loss = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(row.loss_mask)[None], ids, IGNORE)
        labels[:, 0] = IGNORE
        loss = loss + model(input_ids=ids, labels=labels, use_cache=False).loss * (
            row.labelled_tokens / total
        )
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def errors(step: LastStep, loss: float, gradients: dict[str, torch.Tensor]) -> Figures:
    """Return the relative errors, and the adapter whose gradient is furthest off."""
    if set(step.gradients) != set(gradients):
        return {"fault": f"gradients of {len(step.gradients)} adapters, expected {len(gradients)}"}
    off = {name: float((step.gradients[name] - gradients[name]).norm()) for name in gradients}
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    each = {name: off[name] / max(norms[name], 1e-12) for name in gradients}
    worst = max(each, key=each.__getitem__)
    whole = sum(value**2 for value in off.values()) ** 0.5 / sum(value**2 for value in norms.values()) ** 0.5
    figures: Figures = {
        "loss_error": abs(step.loss - loss) / abs(loss),
        "gradient_error": whole,
        "worst_error": each[worst],
        "worst": worst.removeprefix("base_model.model.model.").replace(".default.weight", ""),
    }
    if not max(whole, figures["loss_error"]) <= MOST_ERROR:  # NaN is a fault too
        figures["fault"] = f"loss or gradients more than {MOST_ERROR:.0%} off"
    return figures
