"""The report of a run: settings, data and results, as one JSON file beside the adapter and as a page.

Does not know how the results were measured, nor what the page looks like (html.py). Start at `build`.
"""

import json
import math
import platform
import statistics
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime import __version__
from runtime.config import flatten
from runtime.files import write_atomic
from runtime.hardware import Hardware
from runtime.redaction import redact
from runtime.tuning.arguments import lora
from runtime.tuning.data.dataset import DataSummary
from runtime.tuning.data.tokenize import TokenizedSplit
from runtime.tuning.output import OutputPaths
from runtime.tuning.report import chart, html, verdict
from runtime.tuning.settings import DataSource, TuningJob
from runtime.weights_digest import PendingDigest

CURVE_POINTS = 500
"""Most points of the training curve that the report keeps."""

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True, slots=True)
class Sample:
    """One question, the data's answer, and the model's answers before and after training."""

    question: str
    expected: str
    before: str
    after: str = ""
    ended_before: bool | None = None
    """Whether the model ended its answer; None where the data's is too long to tell."""
    ended_after: bool | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the job ran."""

    hardware: Hardware
    processes: int
    dtype: str
    """Type of the matrix products."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training changed."""

    steps: int
    kept_step: int
    """Step whose weights are the adapter: the last one, unless the job keeps the best."""
    epochs: float
    """How often the rows were trained on."""
    train_loss: float | None
    """Mean loss per labelled token over the last epoch's worth of steps, or all where they are fewer."""
    losses: tuple[chart.Point, ...]
    """(step, training loss) of every logged step."""
    held_out_losses: tuple[chart.Point, ...]
    """(step, held-out loss), measured before, during and after training; empty when nothing is held out."""
    samples: tuple[Sample, ...]
    seconds: float
    tokens_per_s: float
    peak_memory_bytes: int
    planned_memory_bytes: int | None
    """As the memory plan computed; None when the model's shape was not known."""
    machine: Machine

    @property
    def before(self) -> float | None:
        """Held-out loss of the untrained adapter."""
        return self.held_out_losses[0][1] if self.held_out_losses else None

    @property
    def after(self) -> float | None:
        """Held-out loss of the adapter, that is of the kept step."""
        return dict(self.held_out_losses).get(self.kept_step)

    @property
    def endings(self) -> verdict.Endings:
        """How many of the sample answers did not end."""
        told = [each for each in self.samples if None not in (each.ended_before, each.ended_after)]
        before, after = ([ended is False for ended in flags] for flags in (
            [each.ended_before for each in told], [each.ended_after for each in told],
        ))  # fmt: skip
        return verdict.Endings(len(told), sum(before), sum(after))


def build(job: TuningJob, data: DataSummary, tokenized: TokenizedSplit, outcome: Outcome) -> dict[str, Any]:
    """Return the report: settings, data, results, samples and provenance; no secrets, no paths of keys."""
    settings = _settings(job)
    return {
        "job": job.name,
        "run": job.run or job.name,
        "model": {"name": job.model.name, "repository": job.model.repository, "revision": job.model.revision},
        "method": job.method,
        "data": _data(data, tokenized),
        "settings": settings,
        "sources": {name: job.sources.get(name, "default") for name in flatten(settings)},
        "result": _result(outcome),
        "verdict": asdict(_judged(outcome, _held_out_rows(tokenized))),
        "not_served": lora.unserved(job.lora),
        "machine": {
            "kind": outcome.machine.hardware.kind,
            "name": outcome.machine.hardware.name,
            "memory_bytes": outcome.machine.hardware.memory_bytes,
            "processes": outcome.machine.processes,
            "dtype": outcome.machine.dtype,
        },
        "versions": {
            "workspace-runtime": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES},
        },
        "packages": _packages(),
    }


def read(folder: Path) -> dict[str, Any] | None:
    """Return the report in a job's output folder; None where there is none."""
    path = OutputPaths(folder).report
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def save(report: dict[str, Any], folder: Path) -> None:
    """Write the report and its page, each atomically."""
    paths = OutputPaths(folder)
    write_atomic(paths.report, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomic(paths.page, html.render(report))


def weights_of(pending: PendingDigest) -> dict[str, str | None]:
    """Return what the report says of the base model's files: their digest, and the hub's commit."""
    folder = pending.folder
    commit = folder.name if folder.parent.name == "snapshots" else None
    return {"commit": commit, "weights_sha256": pending.wait()}


def _packages() -> dict[str, str]:
    """Return the version of every Python package that is installed."""
    found = {str(each.name): each.version for each in metadata.distributions() if each.name}
    return dict(sorted(found.items(), key=lambda package: package[0].lower()))


def _data(data: DataSummary, tokenized: TokenizedSplit) -> dict[str, Any]:
    train = tokenized.train
    return {
        "files": [asdict(file) for file in data.files],
        "columns": {str(columns): rows for columns, rows in data.facts.columns.items()},
        "unused_columns": list(data.facts.unused),
        "rows": data.rows,
        "skipped_rows": data.skipped,
        "skipped_because": dict(data.skipped_because),
        "train_rows": train.rows,
        "train_sequences": len(train.sequences),
        "held_out_rows": _held_out_rows(tokenized),
        "tokens": train.tokens,
        "trained_tokens": train.labelled_tokens,
        "truncated_rows": train.truncated,
        "too_long_rows": train.too_long,
        "unlabelled_rows": train.unlabelled,
        "row_tokens": _length_summary([len(sequence) for sequence in train.sequences]),
    }


def _held_out_rows(tokenized: TokenizedSplit) -> int:
    return tokenized.held_out.rows if tokenized.held_out else 0


def _judged(outcome: Outcome, held_out_rows: int) -> verdict.Verdict:
    kept = outcome.kept_step if outcome.kept_step != outcome.steps else None
    return verdict.judge(
        outcome.held_out_losses,
        held_out_rows=held_out_rows,
        kept_step=kept,
        epochs=outcome.epochs,
        endings=outcome.endings,
    )


def _result(outcome: Outcome) -> dict[str, Any]:
    return {
        "steps": outcome.steps,
        "kept_step": outcome.kept_step,
        "epochs": round(outcome.epochs, 3),
        "train_loss": outcome.train_loss,
        "held_out_loss": {"before": outcome.before, "after": outcome.after},
        "held_out_perplexity": {
            "before": _perplexity(outcome.before),
            "after": _perplexity(outcome.after),
        },
        "curve": {
            "train": chart.thin(outcome.losses, CURVE_POINTS),
            "held_out": outcome.held_out_losses,
        },
        "samples": [asdict(sample) for sample in outcome.samples],
        "sample_answers": asdict(outcome.endings),
        "seconds": round(outcome.seconds, 1),
        "tokens_per_s": round(outcome.tokens_per_s, 1),
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "planned_memory_bytes": outcome.planned_memory_bytes,
    }


def _settings(job: TuningJob) -> dict[str, Any]:
    """Return what the user may have set, without paths and with the secrets of URLs redacted."""
    shown = {"method": True, "encoding": True, "quantization": True, "lora": True, "training": True}
    locations = {"folder", "file", "urls", "image", "cache"}
    settings = job.model_dump(mode="json", include=shown | {"data": set(DataSource.model_fields) - locations})
    if job.data.urls:
        settings["data"]["urls"] = [redact(url) for url in job.data.urls]
    if job.data.image:
        settings["data"]["image"] = redact(job.data.image)
    return settings


def _length_summary(lengths: list[int]) -> dict[str, float]:
    return {"shortest": min(lengths), "median": statistics.median(lengths), "longest": max(lengths)}


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700))
