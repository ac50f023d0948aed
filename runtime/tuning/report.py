"""What a run was and what came of it, as one JSON file beside the adapter.

Does not know how the figures were made. Start at `Report`.
"""

import json
import math
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime.files import write_whole
from runtime.tuning.dataset import Dataset
from runtime.tuning.encode import Encoded
from runtime.tuning.samples import Sample
from runtime.tuning.settings import TuningJob

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training changed."""

    steps: int
    train_loss: float
    """Mean loss per learnt token over the last epoch's worth of steps."""
    held_out_loss_before: float | None
    held_out_loss_after: float | None
    samples: tuple[Sample, ...]
    seconds: float
    tokens_per_s: float
    peak_memory_bytes: int


def build(
    job: TuningJob, data: Dataset, encoded: tuple[Encoded, Encoded | None], outcome: Outcome
) -> dict[str, Any]:
    """Return the report: settings, data, figures, samples and provenance; no secrets, no paths of keys."""
    train, held_out = encoded
    return {
        "model": {"name": job.model.name, "repository": job.model.repository, "revision": job.model.revision},
        "method": job.method,
        "data": {
            "files": [asdict(file) for file in data.files],
            "rows": len(data.examples),
            "skipped_rows": data.skipped,
            "train_rows": len(train.rows),
            "held_out_rows": len(held_out.rows) if held_out else 0,
            "tokens": train.tokens,
            "trained_tokens": train.targets,
            "truncated_rows": train.truncated,
            "too_long_rows": train.too_long,
            "unlabelled_rows": train.unlabelled,
        },
        "settings": job.model_dump(mode="json", include={"encoding", "quantization", "lora", "training"}),
        "result": {
            "steps": outcome.steps,
            "train_loss": outcome.train_loss,
            "held_out_loss": {"before": outcome.held_out_loss_before, "after": outcome.held_out_loss_after},
            "held_out_perplexity": {
                "before": _perplexity(outcome.held_out_loss_before),
                "after": _perplexity(outcome.held_out_loss_after),
            },
            "samples": [asdict(sample) for sample in outcome.samples],
            "seconds": round(outcome.seconds, 1),
            "tokens_per_s": round(outcome.tokens_per_s, 1),
            "peak_memory_bytes": outcome.peak_memory_bytes,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES},
        },
    }


def save(report: dict[str, Any], path: Path) -> None:
    """Write the report, whole or not at all."""
    write_whole(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700))
