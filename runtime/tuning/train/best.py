"""The weights at the best evaluation of a run, kept until its end (`load_best_model_at_end`).

They are held in memory and written into every checkpoint: no rotation removes them, and a run that resumes,
on whatever machine, knows the best so far. Does not know when evaluations or checkpoints are due. Start at
`BestWeights.on_evaluate`.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runtime.tuning.process.ranks import Ranks

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

FILE = "best.safetensors"
"""In a checkpoint: the trained weights at the best evaluation up to it, with its step and losses."""


class BestWeights(TrainerCallback):
    """Copies the trained weights whenever `metric`, of which less is better, has its lowest value so far.

    Stands before the callback that seals checkpoints. Every rank holds its own copy, of the same numbers.
    """

    def __init__(self, model: "PeftModel", ranks: Ranks, *, metric: str) -> None:
        self.model, self.ranks, self.metric = model, ranks, metric
        self.step = 0
        """Of the best evaluation; 0 before the first one, as the untrained adapter is no result."""
        self.value = float("inf")
        self._weights: dict[str, torch.Tensor] = {}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **_: Any,
    ) -> None:
        value = float((metrics or {}).get(self.metric, float("nan")))
        if state.global_step and value < self.value:
            self.step, self.value = state.global_step, value
            self._weights = {name: tensor.detach().cpu().clone() for name, tensor in self._trained()}

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.step and self.ranks.is_main:
            notes = {"step": str(self.step), "value": repr(self.value), "metric": self.metric}
            path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE
            save_file(self._weights, str(path), metadata=notes)

    def read(self, checkpoint: Path) -> None:
        """Go on from the best that `checkpoint`, a complete one, holds."""
        path = checkpoint / FILE
        if not path.is_file():
            return
        with safe_open(str(path), framework="pt") as stored:
            notes = stored.metadata() or {}
            self._weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        self.step, self.value = int(notes["step"]), float(notes["value"])

    def restore(self) -> None:
        """Give the model the best weights; without an evaluation it keeps those that it has."""
        with torch.no_grad():
            for name, tensor in self._trained() if self.step else ():
                tensor.copy_(self._weights[name])

    def _trained(self) -> "list[tuple[str, torch.nn.Parameter]]":
        return [(name, tensor) for name, tensor in self.model.named_parameters() if tensor.requires_grad]
