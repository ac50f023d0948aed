"""The loss of a batch of rows, and of a whole held-out set.

Logits are computed only where a token is labelled: the vocabulary is the widest layer of a small model,
and most tokens of a row are prompt. Does not know optimizers or jobs. B rows, N columns with a label,
V vocabulary. Start at `batch_loss`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.transfers import to_device
from runtime.tuning.data.batching import IGNORE, Layout, MicroBatch, collate, group, pack
from runtime.tuning.data.tokenize import TokenizedSequence
from runtime.tuning.model.fsdp import is_sharded
from runtime.tuning.model.lora import evaluating
from runtime.tuning.process.ranks import Ranks

if TYPE_CHECKING:
    import torch


def token_loss(logits: "torch.Tensor", labels: "torch.Tensor", *, smoothing: float = 0.0) -> "torch.Tensor":
    """Summed cross-entropy, in float32, of logits (B, N, V) against labels (B, N) that are not IGNORE.

    The caller divides by the count over *all* ranks and micro-batches: a mean of means would weigh
    short answers more.
    """
    from torch.nn.functional import cross_entropy

    loss: torch.Tensor = cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=smoothing,
    )
    return loss


def batch_loss(
    model: "torch.nn.Module", batch: MicroBatch, device: str, *, smoothing: float = 0.0
) -> "torch.Tensor":
    """Run `model` over `batch` and return its summed loss, a scalar with gradients.

    `smoothing` is the share of each label that is spread over the whole vocabulary.

    Nothing of it waits for a GPU, so that the host starts the work of the next pass while this one runs.
    """
    from runtime.tuning.model.fused_loss import LabelledTokens, loss_head
    from runtime.tuning.model.packed_attention import Documents, borders

    inputs: dict[str, Any] = {name: to_device(tensor, device) for name, tensor in batch.inputs.items()}
    if lengths := batch.document_lengths:
        inputs["documents"] = Documents(lengths, to_device(borders(lengths), device))
    idle = not len(batch.logits_to_keep)  # takes part in every collective, adds nothing
    columns = to_device(batch.logits_to_keep.new_zeros(1) if idle else batch.logits_to_keep, device)
    head = None if idle else loss_head(model)
    if head is not None:
        indices = batch.labelled
        targets = to_device(batch.labels.flatten()[indices], device)
        labelled = LabelledTokens(to_device(indices, device), targets, smoothing)
        with head.expecting(labelled):
            loss: torch.Tensor = model(**inputs, logits_to_keep=columns, use_cache=False).logits
        return loss
    logits: torch.Tensor = model(**inputs, logits_to_keep=columns, use_cache=False).logits  # (B, N, V)
    if idle:
        return 0.0 * logits.float().sum()
    return token_loss(logits, to_device(batch.labels, device), smoothing=smoothing)


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """Rows to evaluate on, and how they are divided into passes."""

    rows: Sequence[TokenizedSequence]
    layout: Layout
    budget_tokens: int
    """Most tokens of a pass."""


def unwatched(done: int, total: int) -> None:
    """Nobody waits to be told how far an evaluation is."""


def mean_loss(
    model: "torch.nn.Module",
    held_out: HeldOutRows,
    ranks: Ranks,
    on_pass: Callable[[int, int], None] = unwatched,
) -> float:
    """Return the mean loss per labelled token of rows, which are divided among the ranks; no gradients.

    `on_pass` is told after each pass of this rank how many of them are done, and how many there are.
    """
    import torch

    device = next(parameter.device for parameter in model.parameters() if parameter.requires_grad)
    rows, layout, budget_tokens = held_out.rows, held_out.layout, held_out.budget_tokens
    lengths = [len(row) for row in rows]
    own_rows = range(ranks.rank, len(rows), ranks.world_size)
    loss, labels = torch.zeros((), dtype=torch.float64, device=device), 0
    passes = [*(pack if layout == "packed" else group)(own_rows, lengths, budget_tokens)]
    if is_sharded(model):  # each pass is a collective: a rank with fewer goes through one row more often
        idle = ranks.all_reduce_max(len(passes), str(device)) - len(passes)
        passes += [()] * idle
    with evaluating(model):
        for done, numbers in enumerate(passes, start=1):
            selected = [rows[number] for number in numbers or (lengths.index(min(lengths)),)]
            batch = collate(selected, layout, pad_id=0, with_labels=bool(numbers))
            loss += batch_loss(model, batch, str(device))
            labels += len(batch.labelled)
            on_pass(done, len(passes))
    total = ranks.all_reduce_sum(torch.stack((loss, torch.full_like(loss, labels))))
    return float(total[0] / total[1])
