"""What the settings of a job need of one another: refused before anything is downloaded, and without torch.

transformers raises on most of it too, but only once the model is loaded. Each setting by itself is
training.py's. Start at `check` and `notes`; what needs the number of steps is `check_steps`.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from runtime.errors import ConfigError
from runtime.tuning.arguments import optimizers, schedules
from runtime.tuning.arguments.training import DEFAULTS
from runtime.tuning.data import splits
from runtime.tuning.settings import DataSource, TuningJob

METRICS = ("loss", "perplexity")
"""What an evaluation measures, each with or without "eval_" before it."""

HIGHEST_LEARNING_RATE = 1.0
"""Beyond it every optimizer but plain SGD, whose steps are as small as its gradients, takes absurd steps."""

_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""transformers' defaults, which ask for nothing."""


class Settings:
    """The training arguments of a job, with the place that each was written in."""

    def __init__(self, job: TuningJob, sources: Mapping[str, str]) -> None:
        self.values: dict[str, Any] = {**DEFAULTS, **job.training}
        self.job = job
        self._sources = sources

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, `default` when it was not given."""
        value = self.values.get(name)
        return default if value is None else value

    def where(self, name: str) -> str:
        """Return how messages name the place of an argument."""
        source = self._source(name)
        return source if name in source else f"'{name}'"

    def chosen(self, name: str) -> bool:
        """Whether the user gave the argument."""
        return self._source(name) != "default" and name in self.values

    def _source(self, name: str) -> str:
        path = f"training.{name}"
        found = (source for key, source in self._sources.items() if f"{key}.".startswith(f"{path}."))
        return next(found, "default")


def check(job: TuningJob, sources: Mapping[str, str]) -> None:
    """Raise ConfigError for the first training argument of `job` that does not go with the others.

    `sources` tells the place of each setting by its dotted name.
    """
    settings = Settings(job, sources)
    _check_optimizer(settings)
    _check_schedule(settings)
    _check_steps_given(settings)
    _check_metric(settings)
    _check_evaluations(settings)
    if job.data.train_share == 1 and not _may_have_validation_set(job.data):
        check_held_out(job)
    _check_checkpoints(settings)
    _check_processes(settings)


def _check_optimizer(settings: Settings) -> None:
    name = settings.get("optim")
    optimizers.check(
        name,
        settings.get("optim_args"),
        where=settings.where("optim"),
        where_args=settings.where("optim_args"),
    )
    for key, default in _ADAM.items():
        if not optimizers.OPTIMIZERS[name].adam and settings.get(key, default) != default:
            raise ConfigError(f"{settings.where(key)} has no effect on optim '{name}'; leave it out")
    rate = settings.get("learning_rate")
    if rate > HIGHEST_LEARNING_RATE and name != "sgd":
        raise ConfigError(
            f"{settings.where('learning_rate')} is {rate:g}, expected a number above 0 and at most "
            f"{HIGHEST_LEARNING_RATE:g}, such as {DEFAULTS['learning_rate']:g}"
        )


def _check_schedule(settings: Settings) -> None:
    name = settings.get("lr_scheduler_type")
    given = settings.get("lr_scheduler_kwargs", {})
    schedules.check(
        name, given, learning_rate=settings.get("learning_rate"), where=settings.where("lr_scheduler_kwargs")
    )
    if schedules.SCHEDULES[name].by_loss and settings.get("eval_strategy", "no") == "no":
        raise ConfigError(
            f"{settings.where('lr_scheduler_type')} '{name}' follows the held-out loss: set eval_strategy to "
            "'steps' or 'epoch'"
        )


def _check_steps_given(settings: Settings) -> None:
    steps = settings.get("max_steps", -1)
    if steps == 0 or steps < -1:
        raise ConfigError(
            f"{settings.where('max_steps')} is {steps}, expected at least 1, or -1 to leave it to "
            "num_train_epochs"
        )
    if steps > 0:
        check_steps(settings.job, total=steps)


def check_steps(job: TuningJob, *, total: int) -> None:
    """Raise ConfigError when the schedule of `job` needs more than the `total` steps of its run."""
    training = {**DEFAULTS, **job.training}
    schedules.check_steps(
        training["lr_scheduler_type"],
        training.get("lr_scheduler_kwargs") or {},
        warmup=warmup_steps(job.training, total),
        total=total,
    )
    if needs_evaluations(job) and training.get("eval_strategy") == "steps":
        every = training.get("eval_steps") or training["logging_steps"]
        if every > total:
            raise ConfigError(
                f"'eval_steps' is {every:g}, but the run has {total} steps: nothing is measured"
            )


def warmup_steps(training: Mapping[str, Any], total: int) -> int:
    """Return the steps in which the learning rate rises: a share is never a whole run, however short.

    A user's share is rounded up, as Trainer does. Ours is rounded down: the first step of a warm-up has a
    learning rate of 0, and in a short run the rows of that step are too many to learn nothing from.
    """
    given = training.get("warmup_steps")
    if given is None:
        return int(DEFAULTS["warmup_steps"] * total)
    return int(given) if given >= 1 else min(math.ceil(given * total), total - 1)


def _check_metric(settings: Settings) -> None:
    metric = settings.get("metric_for_best_model")
    if metric is not None and str(metric).removeprefix("eval_") not in METRICS:
        raise ConfigError(
            f"{settings.where('metric_for_best_model')} is '{metric}', expected {' or '.join(METRICS)}: no "
            "other metric is measured"
        )
    if settings.get("greater_is_better"):
        raise ConfigError(f"{settings.where('greater_is_better')} is true, but the lower loss is the better")


def needs_evaluations(job: TuningJob) -> bool:
    """Whether `job` asks for something that only held-out rows can decide."""
    training = {**DEFAULTS, **job.training}
    by_loss = schedules.SCHEDULES[training["lr_scheduler_type"]].by_loss
    return by_loss or bool(training.get("load_best_model_at_end"))


def check_held_out(job: TuningJob) -> None:
    """Raise ConfigError when `job`, for which no rows are held out, needs some."""
    if needs_evaluations(job):
        what = "load_best_model_at_end" if job.training.get("load_best_model_at_end") else "lr_scheduler_type"
        raise ConfigError(
            f"'{what}' needs the loss of held-out rows, and none are held out; set train_test_split below 1"
        )


def _may_have_validation_set(data: DataSource) -> bool:
    """Whether files may be held out by their names; those of a folder or image are not known yet."""
    if data.file is None and not data.urls:
        return True
    names = [PurePath(urlsplit(url).path) for url in data.urls] or [PurePath(str(data.file))]
    return "validation" in splits.assign(names)


def _check_evaluations(settings: Settings) -> None:
    if settings.get("load_best_model_at_end") and settings.get("eval_strategy") == "no":
        raise ConfigError(
            f"{settings.where('load_best_model_at_end')} compares held-out losses, and eval_strategy is "
            "'no'; set it to 'steps' or 'epoch', or leave it out"
        )


def _check_checkpoints(settings: Settings) -> None:
    if settings.get("save_strategy") == "best":
        raise ConfigError(
            f"{settings.where('save_strategy')} is 'best', expected 'no', 'steps' or 'epoch'; to keep the "
            "best, set load_best_model_at_end: true"
        )
    resumed = str(settings.get("resume_from_checkpoint", "true")).lower()
    if resumed not in ("true", "yes"):
        raise ConfigError(
            f"{settings.where('resume_from_checkpoint')} is '{resumed}', but a job resumes from its own "
            "newest checkpoint; leave it out, and for a new run name another output folder"
        )


def _check_processes(settings: Settings) -> None:
    if settings.get("auto_find_batch_size") and settings.job.parallel == "fsdp":
        raise ConfigError(
            f"{settings.where('auto_find_batch_size')} does not go with fsdp, whose ranks make the same "
            "passes; use --fit"
        )


def check_device(job: TuningJob, kind: str) -> None:
    """Raise ConfigError when `job` asks for another device than the machine's."""
    if kind == "cuda" and job.training.get("use_cpu"):
        raise ConfigError(
            "'use_cpu' is true, but this machine has a GPU; leave it out, or hide the GPU with "
            "CUDA_VISIBLE_DEVICES="
        )


def notes(job: TuningJob, sources: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each training argument of `job` that asks for something and has no effect."""
    settings = Settings(job, sources)
    scheduler = settings.get("lr_scheduler_type")
    rises = schedules.SCHEDULES[scheduler].warmup
    if not rises and settings.chosen("warmup_steps") and settings.get("warmup_steps"):
        yield f"{settings.where('warmup_steps')} has no effect: lr_scheduler_type '{scheduler}' does not rise"
    yield from _idle_steps(settings)
    if settings.get("eval_strategy", "no") != "no" and job.data.train_share == 1:
        where = settings.where("eval_strategy")
        yield f"{where} has no effect unless rows are held out; set train_test_split below 1"
    if settings.get("metric_for_best_model") and not needs_evaluations(job):
        yield f"{settings.where('metric_for_best_model')} has no effect without load_best_model_at_end"
    loggers = set(settings.get("report_to")) - {"none"}
    if settings.get("run_name") and not loggers:
        yield f"{settings.where('run_name')} has no effect without a logger in report_to"
    trackio = ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
    for name in (*trackio, "project"):
        if settings.get(name, "huggingface") not in ("huggingface", "False") and not loggers & {
            "trackio",
            "all",
        }:
            yield f"{settings.where(name)} has no effect without trackio in report_to"


def _idle_steps(settings: Settings) -> Iterator[str]:
    for what in ("save", "eval", "logging"):
        strategy = settings.get(f"{what}_strategy", "steps")
        if settings.chosen(f"{what}_steps") and settings.get(f"{what}_steps") and strategy != "steps":
            yield f"{settings.where(f'{what}_steps')} has no effect: {what}_strategy is '{strategy}'"
