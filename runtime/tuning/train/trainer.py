"""transformers' Trainer with our batches, our loss and our ends.

The loop, optimizers, schedulers, DDP, mixed precision and resume are the library's; one of its batches is
one optimizer step of ours (a `RankBatch`), which `training_step` works through in micro-batches.
Does not know files of data or jobs. Start at `AdapterTrainer.training_step`.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from runtime.errors import CapacityError, DivergedError
from runtime.tuning.data.batching import BatchPlan, RankBatch, collate
from runtime.tuning.data.tokenize import TokenizedRow
from runtime.tuning.loss import batch_loss, mean_loss
from runtime.tuning.model.fsdp import average_gradients, is_sharded
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.report.progress import Throughput

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is trained on, and by whom."""

    rows: tuple[TokenizedRow, ...]
    held_out: tuple[TokenizedRow, ...]
    plan: BatchPlan
    ranks: Ranks
    pad_id: int = 0


class StepSampler(Sampler[list[RankBatch]]):
    """Yields this rank's share of every step of the epoch that `set_epoch` names."""

    def __init__(self, plan: BatchPlan, rank: int) -> None:
        self.plan, self.rank, self.epoch = plan, rank, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[RankBatch]]:
        for rows in self.plan.steps(self.epoch):
            yield [self.plan.share(rows, self.rank)]

    def __len__(self) -> int:
        return self.plan.steps_per_epoch


class _Identity(Dataset[RankBatch]):
    """A data set whose index is its item: the sampler already says all."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, share: RankBatch) -> RankBatch:
        return share


def _only(items: list[RankBatch]) -> RankBatch:
    return items[0]


class StepLoader(DataLoader[RankBatch]):
    """A DataLoader that tells its sampler the epoch; Trainer looks for the method."""

    def set_epoch(self, epoch: int) -> None:
        """Pass `epoch` on to the sampler."""
        if isinstance(self.batch_sampler, StepSampler):
            self.batch_sampler.set_epoch(epoch)


class AdapterTrainer(Trainer):
    """Trains a PeftModel on a `Workload`."""

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        work: Workload,
        meter: Throughput,
        watchers: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Identity(len(work.rows)),
            eval_dataset=_Identity(len(work.held_out)) if work.held_out else None,
            callbacks=watchers,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.work, self.meter = work, meter
        self.plan = work.plan
        self.sharded = is_sharded(model)
        # Not DDP's to average, which does so within the backward pass: a rank that ran out of memory in it
        # repeats its own step while the others wait.
        self.averages = self.sharded or (args.auto_find_batch_size and work.ranks.world > 1)
        if self.sharded:  # no DDP around it: its gradients are averaged in `_step`
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def get_train_dataloader(self) -> DataLoader[RankBatch]:
        """Return the steps; not sharded by accelerate, each rank's `StepSampler` are its own already."""
        sampler = StepSampler(self.plan, self.work.ranks.rank)
        return StepLoader(_Identity(len(self.work.rows)), batch_sampler=sampler, collate_fn=_only)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Return the next step's share; how many tokens count in it is part of the share."""
        return [share for _, share in zip(range(num_batches), epoch_iterator, strict=False)], None

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: tokens per second are."""
        return 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over the rank's micro-batches of one optimizer step.

        Returns the rank's part of the step's mean loss times the number of ranks, so that Trainer's mean
        over ranks is the loss per learnt token of the whole step.
        """
        model.train()
        share: RankBatch = inputs if self.plan is self.work.plan else self._arranged(inputs)
        while True:
            try:
                return self._step(model, share)
            except torch.OutOfMemoryError:
                self._shrink(model, share)
                share = self._arranged(share)

    def _step(self, model: Any, share: RankBatch) -> torch.Tensor:
        device, scale = str(self.args.device), self.work.ranks.world / share.targets
        total = torch.zeros((), device=self.args.device)
        tokens = 0
        passes = [(rows, not share.idle) for rows in share.micro_batches]
        if self.sharded:  # each pass is a collective: a rank with fewer repeats one that counts nothing
            passes += [(passes[-1][0][:1], False)] * (self.work.ranks.most(len(passes), device) - len(passes))
        for number, (rows, counts) in enumerate(passes, 1):
            batch = collate(
                [self.work.rows[row] for row in rows],
                self.plan.layout,
                pad_id=self.work.pad_id,
                counts=counts,
            )
            final = number == len(passes) and not self.averages
            with contextlib.nullcontext() if final else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = batch_loss(model, batch, device) * scale
                if not torch.isfinite(loss):
                    raise DivergedError(
                        f"the loss became {loss.item()} at step {self.state.global_step + 1}; lower "
                        f"learning_rate (now {self.args.learning_rate:g}); the last checkpoint stays"
                    )
                self.accelerator.backward(loss)
            total += loss.detach()
            tokens += batch.tokens if counts else 0
        if self.averages:
            average_gradients(model.parameters(), self.work.ranks.world)
        self.meter.count(tokens, share.targets)
        return total

    def _shrink(self, model: Any, share: RankBatch) -> None:
        """Halve the token budget of a pass after CUDA ran out of memory, or raise CapacityError."""
        budget = self.plan.budget_tokens
        longest = max(len(self.work.rows[row]) for rows in share.micro_batches for row in rows)
        if not self.args.auto_find_batch_size or self.sharded or budget <= longest:
            raise CapacityError(
                f"out of GPU memory with {budget} tokens in a pass, longest row {longest}; lower max_length "
                "or per_device_train_batch_size, or set gradient_checkpointing: true"
            ) from None
        model.zero_grad()
        torch.cuda.empty_cache()
        self.plan = replace(self.plan, budget_tokens=max(longest, budget // 2))
        log.warning("out of GPU memory: going on with %d tokens a pass", self.plan.budget_tokens)

    def _arranged(self, share: RankBatch) -> RankBatch:
        """Return the same share in passes of the present budget: shares are dealt one ahead of the steps."""
        rows = [row for rows in share.micro_batches for row in rows]
        return replace(share, micro_batches=self.plan.passes(rows))

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Return the held-out loss per learnt token, and the perplexity, of all ranks together."""
        loss = self.held_out_loss()
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700)),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_loss(self) -> float:
        """Return the mean loss per learnt token of the held-out rows."""
        plan, model = self.plan, cast(PeftModel, self.model)
        with self.compute_loss_context_manager():
            return mean_loss(
                model,
                self.work.held_out,
                self.work.ranks,
                layout=plan.layout,
                budget_tokens=plan.budget_tokens,
            )
