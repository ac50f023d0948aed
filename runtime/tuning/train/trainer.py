"""transformers' Trainer with our batches, our loss and our out-of-memory handling.

The loop, optimizers, schedulers, DDP, mixed precision and resume are the library's; one of its batches is
one optimizer step of ours (a `RankBatch`), which `training_step` runs in micro-batches.
Does not know data files or jobs. Start at `AdapterTrainer.training_step`.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from runtime.errors import CapacityError, ConfigError, DivergedError, is_out_of_memory, one_line
from runtime.tuning.data.batching import BatchPlan, MicroBatch, RankBatch, collate
from runtime.tuning.data.tokenize import TokenizedSequence
from runtime.tuning.loss import HeldOutRows, batch_loss, mean_loss, unwatched
from runtime.tuning.model import adapter_matrices
from runtime.tuning.model.embedding_noise import EmbeddingNoise
from runtime.tuning.model.fsdp import average_gradients, is_sharded
from runtime.tuning.model.fused_lora import adapter_groups
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.train.progress import Throughput

log = logging.getLogger(__name__)


_UNSUITABLE = (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError)
"""What transformers and the optimizers raise for a setting that runtime/tuning/arguments let pass."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The sequences to train and evaluate on, and how they are divided over steps and ranks."""

    sequences: tuple[TokenizedSequence, ...]
    held_out: tuple[TokenizedSequence, ...]
    plan: BatchPlan
    ranks: Ranks
    pad_id: int = 0
    on_pass: Callable[[int, int], None] = unwatched
    """Told how many passes of an evaluation are done, and of how many."""


class AdapterTrainer(Trainer):
    """Trains a PeftModel on a `Workload`."""

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        workload: Workload,
        throughput: Throughput,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Identity(len(workload.sequences)),
            eval_dataset=_Identity(len(workload.held_out)) if workload.held_out else None,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.workload, self.throughput = workload, throughput
        self.noise = EmbeddingNoise(model, args.neftune_noise_alpha or 0.0)
        self.neftune_noise_alpha = None  # transformers' own noise
        self.input_tokens = 0
        """Of this rank's last step, padding included where `include_num_input_tokens_seen` counts all."""
        self.adapter_groups = adapter_groups(model)
        self.gradient_norm: tuple[torch.Tensor, float] | None = None
        """Of this step, on the device and as read; None where the loss scaler is still in them."""
        self.plan = workload.plan
        self.sharded = is_sharded(model)
        # Not DDP's to average, which does so within the backward pass: a rank that ran out of memory in it
        # repeats its own step while the others wait.
        self.averages = self.sharded or (args.auto_find_batch_size and workload.ranks.world_size > 1)
        if self.sharded:  # no DDP around it: its gradients are averaged in `_run_step`
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over the rank's micro-batches of one optimizer step.

        Returns the rank's part of the step's mean loss times the number of ranks, so that Trainer's mean
        over ranks is the loss per labelled token of the whole step. DivergedError when that is not finite.
        """
        model.train()
        batch: RankBatch = inputs if self.plan is self.workload.plan else self._regroup(inputs)
        while (loss := self._attempt(model, batch)) is None:
            self._halve_budget(model, batch)
            batch = self._regroup(batch)
        return self._check_finite(loss, model)

    def _attempt(self, model: Any, batch: RankBatch) -> torch.Tensor | None:
        """Run a step; None where memory ran out.

        What the failed pass held lives as long as its traceback, so nothing is freed before this returns.
        """
        try:
            return self._run_step(model, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _run_step(self, model: Any, batch: RankBatch) -> torch.Tensor:
        ranks, scale = self.workload.ranks, self.workload.ranks.world_size / batch.labelled_tokens
        total = torch.zeros((), device=self.args.device)
        tokens = width = 0
        passes = [(rows, not batch.idle) for rows in batch.micro_batches]
        if self.sharded:  # each pass is a collective: a rank with fewer repeats one that counts nothing
            passes += [(passes[-1][0][:1], False)] * (batch.most_passes - len(passes))
        with adapter_matrices.held(self.adapter_groups, self.compute_dtype):
            for number, (rows, counts) in enumerate(passes, 1):
                micro_batch = collate(
                    [self.workload.sequences[row] for row in rows],
                    self.plan.layout,
                    pad_id=self.workload.pad_id,
                    with_labels=counts,
                )
                final = number == len(passes) and not self.averages
                with contextlib.nullcontext() if final else self.accelerator.no_sync(model):
                    total += self._run_micro_batch(model, micro_batch, scale)
                tokens += micro_batch.tokens if counts else 0
                width += micro_batch.inputs["input_ids"].numel() if counts else 0
        if self.averages:
            average_gradients(model.parameters(), ranks.world_size)
        self.throughput.count(tokens, batch.labelled_tokens)
        self.input_tokens = width if self.args.include_num_input_tokens_seen == "all" else tokens
        return total

    def _run_micro_batch(self, model: Any, micro_batch: MicroBatch, scale: float) -> torch.Tensor:
        """Forward and backward; returns the loss times `scale`."""
        smoothing = self.args.label_smoothing_factor
        with self.compute_loss_context_manager(), self.noise.within(micro_batch):
            loss = batch_loss(model, micro_batch, str(self.args.device), smoothing=smoothing) * scale
        self.accelerator.backward(loss)
        return loss.detach()

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that training passes compute in."""
        if self.args.bf16:
            return torch.bfloat16
        return torch.float16 if self.args.fp16 else torch.float32

    def _check_finite(self, loss: torch.Tensor, model: Any) -> torch.Tensor:
        """Return the loss; DivergedError before a NaN or infinite number reaches a weight.

        The one time in a step that the host waits for the device: it reads the loss and the gradients' norm
        together. Gradients in float16 are left to the loss scaler, which skips the steps in which they
        overflow. A single process goes on with the loss that it has read; several have yet to gather it.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms = [] if self.args.fp16 else [get_total_norm(gradients)]
        numbers = torch.stack([loss, *norms]).cpu()
        for what, number in zip(("the loss", "a gradient"), numbers.tolist(), strict=False):
            if not math.isfinite(number):
                raise DivergedError(
                    f"{what} became {number} at step {self.state.global_step + 1}; lower learning_rate "
                    f"(now {self.args.learning_rate:g}); the last checkpoint stays"
                )
        self.gradient_norm = (norms[0], float(numbers[1])) if norms else None
        if self.workload.ranks.world_size > 1:
            return loss
        if self._tr_loss.device.type != "cpu":  # transformers' sum of losses, at the first step
            self._tr_loss = torch.zeros(())
        return numbers[0]

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients by the norm that `_check_finite` found."""
        if self.gradient_norm is None:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        norm, read = self.gradient_norm
        clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return read

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm to log."""
        if self.gradient_norm is None:
            return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        return self.gradient_norm[1]

    def _halve_budget(self, model: Any, batch: RankBatch) -> None:
        """Halve the token budget of a pass after CUDA ran out of memory, or raise CapacityError."""
        budget = self.plan.budget_tokens
        longest = max(len(self.workload.sequences[row]) for row in _rows(batch))
        if not self.args.auto_find_batch_size or self.sharded or budget <= longest:
            raise CapacityError(
                f"out of GPU memory with {budget} tokens in a pass, longest row {longest}; lower max_length "
                "or per_device_train_batch_size, or set gradient_checkpointing: true"
            )
        model.zero_grad()
        torch.cuda.empty_cache()
        self.plan = replace(self.plan, budget_tokens=max(longest, budget // 2))
        log.warning("out of GPU memory: continuing with %d tokens a pass", self.plan.budget_tokens)

    def _regroup(self, batch: RankBatch) -> RankBatch:
        """Return `batch` in passes of the present budget: the loader prefetches one step ahead."""
        return replace(batch, micro_batches=self.plan.micro_batches(_rows(batch)))

    def get_train_dataloader(self) -> DataLoader[RankBatch]:
        """Return the steps; not sharded by accelerate, as a `StepSampler` yields this rank's part only."""
        sampler = StepSampler(self.plan, self.workload.ranks.rank)
        return StepLoader(_Identity(len(self.workload.sequences)), batch_sampler=sampler, collate_fn=_only)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Return the next step's batch; no count of its items, which the batch itself holds."""
        return [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)], None

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count the tokens of a step on all ranks, where the job asks for it."""
        if self.args.include_num_input_tokens_seen != "no":
            own = torch.tensor(self.input_tokens, device=self.args.device)
            self.state.num_input_tokens_seen += int(self.workload.ranks.all_reduce_sum(own))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer; ConfigError when its settings do not suit it."""
        try:
            return super().create_optimizer(model)
        except _UNSUITABLE as error:
            raise ConfigError(f"TrainingArguments: optim '{self.args.optim}': {one_line(error)}") from error

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the learning rate's schedule; ConfigError when its settings do not suit it."""
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except _UNSUITABLE as error:
            kind = self.args.lr_scheduler_type
            raise ConfigError(f"TrainingArguments: lr_scheduler_type '{kind}': {one_line(error)}") from error

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: tokens per second are."""
        return 0

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Return the held-out loss per labelled token, and the perplexity, of all ranks together."""
        loss = self.held_out_loss()
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700)),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_loss(self) -> float:
        """Return the mean loss per labelled token of the held-out rows."""
        plan, model = self.plan, cast(PeftModel, self.model)
        with self.compute_loss_context_manager():
            held_out = HeldOutRows(self.workload.held_out, plan.layout, plan.budget_tokens)
            return mean_loss(model, held_out, self.workload.ranks, self.workload.on_pass)


class StepSampler(Sampler[list[RankBatch]]):
    """Yields this rank's part of every step of the epoch given to `set_epoch`."""

    def __init__(self, plan: BatchPlan, rank: int) -> None:
        self.plan, self.rank, self.epoch = plan, rank, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[RankBatch]]:
        for rows in self.plan.steps(self.epoch):
            yield [self.plan.rank_batch(rows, self.rank)]

    def __len__(self) -> int:
        return self.plan.steps_per_epoch


class StepLoader(DataLoader[RankBatch]):
    """A DataLoader that passes the epoch on to its sampler; Trainer looks for the method."""

    def set_epoch(self, epoch: int) -> None:
        """Pass `epoch` on to the sampler."""
        if isinstance(self.batch_sampler, StepSampler):
            self.batch_sampler.set_epoch(epoch)


class _Identity(Dataset[RankBatch]):
    """A data set whose index is its item: the sampler already yields batches."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, batch: RankBatch) -> RankBatch:
        return batch


def _only(items: list[RankBatch]) -> RankBatch:
    return items[0]


def _rows(batch: RankBatch) -> list[int]:
    return [row for rows in batch.micro_batches for row in rows]
