"""Which job an adapter or a checkpoint belongs to: what decides its bytes, and nothing else.

Two runs are one job when they take the same steps over the same rows from the same base model. What is only
logged, when checkpoints are taken, or how a step is divided into passes is none of it, and no secret is: data
counts by its digests, an address without its query. Does not know files of the output folder (output.py).
Start at `requested` and `JobIdentity.differences`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from runtime.config import flatten
from runtime.errors import DataError
from runtime.files import sampled_sha256
from runtime.tuning.arguments import rules
from runtime.tuning.arguments.training import DEFAULTS
from runtime.tuning.settings import DataSource, TuningJob

if TYPE_CHECKING:
    from runtime.tuning.data.tokenize import TokenizedSplit

DECISIVE = frozenset(
    {
        "model.repository", "model.revision", "model.image", "model.package", "model.trust_remote_code",
        "model.dtype", "model.chat_template", "model.attention",
        "data.extension", "data.messages_column", "data.context_column", "data.response_column",
        "data.shuffle", "data.shuffle_seed", "data.train_share",
        "encoding", "method", "quantization", "lora",
    }
)  # fmt: skip
"""Settings of a `TuningJob` that decide the adapter's bytes; a group stands for all that is in it."""

WITHOUT_EFFECT = frozenset(
    {
        "name", "run", "output", "sources", "metrics_host", "metrics_port", "checkpoint_minutes", "hub_token",
        # the base model and the rows count by their content, wherever they lie
        "model.name", "model.path", "model.local_files_only", "model.required_keys",
        "data.urls", "data.image", "data.folder", "data.file", "data.allow_private_addresses",
        "data.cache",
        # what a run refuses, and another skips or has room for: they train on the same, or one does not train
        "data.on_bad_row", "data.max_bytes",
        # the same steps, divided otherwise over passes and GPUs; rows cut shorter show in the encoded rows
        "parallel", "fit", "tokens_per_pass",
    }
)  # fmt: skip
"""The other settings; a test has each of them in one of the two tables."""

_EVALUATIONS = ("eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model")
"""TrainingArguments that decide bytes where the step that is kept or the learning rate depends on them."""

DECISIVE_TRAINING = frozenset(
    {
        "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
        "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
        "optim", "optim_args", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "label_smoothing_factor", "neftune_noise_alpha",
        "bf16", "fp16", "tf32", "seed", "data_seed", "full_determinism", "dataloader_drop_last",
        "load_best_model_at_end", *_EVALUATIONS,
    }
)  # fmt: skip
"""TrainingArguments that decide the adapter's bytes, among those that are honoured at all."""

TRAINING_WITHOUT_EFFECT = frozenset(
    {
        "output_dir", "resume_from_checkpoint",
        "logging_strategy", "logging_steps", "logging_first_step", "include_num_input_tokens_seen",
        "log_level", "log_level_replica", "report_to", "run_name", "project",
        "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
        "save_strategy", "save_steps", "save_total_limit",
        "greater_is_better",  # only false is taken
        # recomputed activations are the same numbers
        "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
        "gradient_checkpointing_kwargs", "auto_find_batch_size",
        # how ranks work together: our own plan of steps decides who computes what
        "use_cpu", "fsdp", "train_sampling_strategy",
        "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    }
)  # fmt: skip
"""The other ones that are honoured; a test has each of them in one of the two tables."""

_MODEL_FILES = (
    "config.json", "*.safetensors", "*.bin", "tokenizer*", "*.model", "*token*.json", "vocab.*", "merges.txt",
    "chat_template*",
)  # fmt: skip

_SHOWN_DIFFERENCES = 3
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """What decides the bytes of a job's adapter; the empty fields are not known yet."""

    settings: Mapping[str, Any]
    """The decisive settings by their dotted names."""
    model: str = ""
    """Digest of the base model's files."""
    source: tuple[str, ...] = ()
    """Where the data is fetched from, without queries; decides nothing once its digests are known."""
    files: tuple[str, ...] = ()
    """Digests of the data files, in order."""
    rows: str = ""
    """Digest of the rows as they are encoded: tokenizer, template and our encoding are in it."""
    processes: int = 0
    """Ranks of the run where the rows of a step depend on them, else 0."""

    @property
    def digest(self) -> str:
        """64 hex digits, equal exactly for runs of one job."""
        decisive = [self.settings, self.model, self.files, self.rows, self.processes]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def differences(self, earlier: "JobIdentity") -> tuple[str, ...]:
        """Return in words what tells this job from an `earlier` one; what either does not know, does not."""
        found = list(_changes(earlier.settings, self.settings))
        if self.model and earlier.model and self.model != earlier.model:
            found.append("the base model's files")
        if self.files and earlier.files:
            if self.files != earlier.files:
                found.append("the data")
            elif self.rows and earlier.rows and self.rows != earlier.rows:
                found.append("how the rows are encoded (tokenizer, template or release)")
        elif self.source and self.source != earlier.source:
            found.append("the data's address")
        if self.processes and earlier.processes and self.processes != earlier.processes:
            found.append(f"processes {earlier.processes}, now {self.processes}")
        return tuple(found)

    def to_json(self) -> str:
        """Return this as a text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the identity that the file at `path` holds; None where there is none."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @classmethod
    def from_json(cls, text: str) -> Self | None:
        """Return the identity that `to_json` made `text` of; None for any other text."""
        try:
            known = json.loads(text)
            return cls(
                settings=dict(known["settings"]),
                model=str(known["model"]),
                source=tuple(map(str, known["source"])),
                files=tuple(map(str, known["files"])),
                rows=str(known["rows"]),
                processes=int(known["processes"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


def requested(job: TuningJob) -> JobIdentity:
    """Return what is known of a job before anything is fetched: its settings, and the files that are here."""
    model, data = job.model, job.data
    folder = model.path
    if folder is None and model.image is None and model.repository is None:
        folder = Path(model.name)
    return JobIdentity(
        settings=decisive_settings(job),
        model=model_digest(folder) if folder else "",
        source=addresses(data),
        files=() if addresses(data) else _local_digests(data),
    )


def addresses(data: DataSource) -> tuple[str, ...]:
    """Return where the data is fetched from, without queries; () for data on this machine."""
    return tuple(_without_query(each) for each in data.urls or ((data.image,) if data.image else ()))


def decisive_settings(job: TuningJob) -> dict[str, Any]:
    """Return the settings that decide the bytes, by dotted names; training arguments over our defaults."""
    dumped = job.model_dump(mode="json", exclude={"training", "sources"})
    settings = {
        name: value
        for name, value in flatten(dumped).items()
        if _head(name, 1) in DECISIVE or _head(name, 2) in DECISIVE
    }
    training = {**DEFAULTS, **job.training}
    skipped = () if rules.needs_evaluations(job) else _EVALUATIONS
    for name in DECISIVE_TRAINING.difference(skipped):
        if training.get(name) is not None:
            settings[f"training.{name}"] = training[name]
    as_read_back: dict[str, Any] = json.loads(json.dumps(settings, sort_keys=True, default=str))
    return as_read_back


def model_digest(folder: Path) -> str:
    """Return a digest of the base model in `folder`, "" without one; large files are sampled."""
    found = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    if not found:
        return ""
    whole = hashlib.sha256()
    for path in found:
        whole.update(f"{path.name} {sampled_sha256(path)}\n".encode())
    return whole.hexdigest()


def rows_digest(tokenized: "TokenizedSplit") -> str:
    """Return a digest of the token ids and labels of all rows, and of which sequences are one, in order."""
    digest = hashlib.sha256(str(tokenized.train.sequences_per_row).encode())
    for sequence in tokenized.sequences:
        digest.update(len(sequence).to_bytes(8))
        digest.update(sequence.ids.tobytes())
        digest.update(sequence.loss_mask.tobytes())
    return digest.hexdigest()


def _local_digests(data: DataSource) -> tuple[str, ...]:
    """Return the digests of data that lies on this machine; () where it is gone."""
    from runtime.tuning.data import dataset  # reads files, with numpy

    try:
        return dataset.digests_of(data)
    except (DataError, OSError):
        return ()


def _without_query(address: str) -> str:
    """Return an address without user and query, which may hold secrets that change; its digest stays."""
    try:
        parts = urlsplit(address)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return hashlib.sha256(address.encode()).hexdigest()
    return parts._replace(netloc=host, query="").geturl()


def _changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for name in sorted(earlier.keys() | now.keys()):
        old, new = (json.dumps(each.get(name)) for each in (earlier, now))
        if old != new:
            shown = name.removeprefix("training.")
            long = max(len(old), len(new)) > _SHOWN_CHARACTERS
            yield shown if long else f"{shown} {old}, now {new}"


def in_words(differences: Sequence[str]) -> str:
    """Return the first few differences as one phrase."""
    left = len(differences) - _SHOWN_DIFFERENCES
    return "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; {left} more" if left > 0 else "")


def _head(name: str, parts: int) -> str:
    return ".".join(name.split(".")[:parts])
