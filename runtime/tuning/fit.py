"""Whether a job fits into memory: its plan on this hardware, the settings that follow, what would help.

Turns settings into the numbers of runtime/memory and its forecast back into settings. The parent process
refuses by it before data is fetched (`check`), each worker chooses settings by it when the rows are known
(`resolve`). Does not know weights or devices beyond their numbers. Start at `plan`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime import families, gpus, hardware, support
from runtime.adapters import LoraFields
from runtime.config import parse
from runtime.errors import CapacityError, ConfigError
from runtime.hardware import Hardware
from runtime.memory import fitting
from runtime.memory.fitting import Adjustable, Forecast
from runtime.memory.shape import Shape, of
from runtime.memory.tuning import TuningRun, patterned
from runtime.tuning.arguments import rules
from runtime.tuning.arguments.training import DEFAULTS
from runtime.tuning.data.tokenize import MAX_TOKENS, TokenizedSequence
from runtime.tuning.precision import choose_dtype
from runtime.tuning.settings import TuningJob
from runtime.tuning.train.schedule import pass_tokens, requested_checkpointing, rows_per_step

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A job on some hardware: what it would take as requested, and with the settings chosen for it."""

    shape: Shape
    machine: Hardware
    requested: TuningRun
    """As the job says, before anything was chosen."""
    adjustable: Adjustable
    """What of it may be changed to make it fit."""
    forecast: Forecast
    """With the settings that were chosen."""
    advice: tuple[str, ...]
    """What would make it fit, when it does not."""

    @property
    def largest_tokens(self) -> int:
        """Most tokens of one pass that fit with the chosen settings."""
        return fitting.largest_tokens(self.shape, self.forecast.run, room=self.forecast.available_bytes)

    @property
    def longest_row(self) -> int:
        """Longest row that fits, alone in a pass and with checkpointing; the model's context at most."""
        run = replace(self.forecast.run, checkpointing=True, row_tokens=self.shape.context_tokens)
        length = fitting.largest_tokens(self.shape, run, room=self.forecast.available_bytes)
        return min(length, self.shape.context_tokens)

    @property
    def pass_size(self) -> str:
        """Why a pass holds as many tokens as it does, in a few words."""
        chosen, most = self.forecast.run.tokens, self.adjustable.larger_passes
        wanted = max(self.requested.tokens, self.adjustable.row_tokens)
        if chosen < max(wanted, most):
            return "as many as fit"
        if chosen == wanted:
            return "one row" if wanted == self.adjustable.row_tokens else "as requested"
        return "more gain nothing" if most == fitting.SATURATING_TOKENS["cuda"] else "the rows of a step"

    @property
    def summary(self) -> str:
        """The forecast in one line, with the advice when it does not fit."""
        need, room = self.forecast.total_bytes / GIB, self.forecast.available_bytes / GIB
        where = f"{self.machine.name} ({room:.1f} GiB usable)"
        passes = f"passes of {self.forecast.run.tokens} tokens ({self.pass_size})"
        how = f"{passes} {'with' if self.forecast.run.checkpointing else 'without'} gradient checkpointing"
        if self.forecast.fits:
            return f"{need:.1f} GiB on {where}: {how}"
        return f"{self.shape.name} needs {need:.1f} GiB for {how} on {where}; {', or '.join(self.advice)}"


def plan(
    job: TuningJob, machine: Hardware, *, processes: int | None = None, rows: Sequence[TokenizedSequence] = ()
) -> MemoryPlan:
    """Return the plan of `job` on `machine` with `processes` there (None: one for each GPU).

    Without `rows` every row is taken to be as long as it may be, and all of it labelled. Raises ConfigError
    when the model's shape is not known, or the model cannot be tuned on `machine`.
    """
    check_model(job, machine)
    shape = of(job.model)
    count = processes or machine.count
    longest = max((len(row) for row in rows), default=0)
    row_tokens = longest or job.encoding.max_tokens or min(shape.context_tokens, MAX_TOKENS)
    requested = _run(job, shape, machine, processes=count, row_tokens=row_tokens)
    if rows:
        requested = replace(requested, labelled_share=max(row.labelled_tokens / len(row) for row in rows))
    checkpointing = requested_checkpointing(job)
    free = job.fit != "refuse" or "per_device_train_batch_size" not in job.training
    larger = free and job.tokens_per_pass is None
    adjustable = Adjustable(
        row_tokens,
        checkpointing=checkpointing if checkpointing or job.fit == "refuse" else None,
        smaller_passes=free,
        larger_passes=_useful_tokens(job, machine, count, row_tokens=row_tokens, rows=rows) if larger else 0,
        shorter_rows=job.fit == "shorten" and not rows,
    )
    room = fitting.available(machine, processes=count)
    forecast = fitting.choose(shape, requested, adjustable, room=room)
    planned = MemoryPlan(shape, machine, requested, adjustable, forecast, ())
    return planned if forecast.fits else replace(planned, advice=_advice(job, planned))


def _useful_tokens(
    job: TuningJob, machine: Hardware, processes: int, *, row_tokens: int, rows: Sequence[TokenizedSequence]
) -> int:
    """Return the tokens of a pass above which more gain nothing: of a step on one rank, or of any pass."""
    count = rows_per_step(job, len(rows) or None, processes)
    longest = sorted((len(row) for row in rows), reverse=True)[:count] or [row_tokens] * count
    step = min(sum(longest), sum(longest) // processes + row_tokens)
    return min(step, fitting.SATURATING_TOKENS[machine.kind])


def check(job: TuningJob, machine: Hardware, *, processes: int | None = None) -> None:
    """Raise CapacityError, with advice, when `job` cannot fit on `machine`, whatever its rows are.

    Raises ConfigError when the model cannot be tuned on `machine`, or transformers builds none of it.
    """
    check_model(job, machine)
    if job.model.trust_remote_code:  # whose shape only its own code may know
        planned = _plan_if_known(job, machine, processes or machine.count)
    else:
        planned = plan(job, machine, processes=processes or machine.count)
    if planned is not None and not planned.forecast.fits:
        raise CapacityError(planned.summary)
    if planned is not None:
        log.debug("memory plan for rows of any length: %s", planned.summary)


def check_model(job: TuningJob, machine: Hardware) -> None:
    """Raise ConfigError where the model of `job` cannot be tuned on `machine`."""
    rules.check_device(job, machine.kind)
    wishes = [f"--set training.{name}=false" for name in ("bf16", "fp16") if job.training.get(name)]
    how = " ".join(["--set model.dtype=float32", *wishes])
    support.check_tuner(job.model, machine, dtype=choose_dtype(job, machine), how=how)


def shorten(job: TuningJob, machine: Hardware, *, processes: int) -> TuningJob:
    """Return `job` with its rows cut as short as its memory needs, where it allows that."""
    planned = _plan_if_known(job, machine, processes) if job.fit == "shorten" else None
    if planned is None:
        return job
    requested, chosen = planned.adjustable.row_tokens, planned.forecast.row_tokens
    if chosen == requested:
        return job
    log.warning("rows are cut at %d tokens, not %d, to fit", chosen, requested)
    encoding = job.encoding.model_copy(update={"max_tokens": chosen})
    return job.model_copy(update={"encoding": encoding})


def resolve(
    job: TuningJob, machine: Hardware, *, processes: int, rows: Sequence[TokenizedSequence]
) -> tuple[TuningJob, int | None]:
    """Return `job` with the pass size and the checkpointing that fit for these `rows`, and the bytes planned.

    The same on every rank: it depends on lengths and on the kind of device alone. None bytes without a
    plan. Raises CapacityError when nothing fits.
    """
    planned = _plan_if_known(job, machine, processes, rows)
    if planned is None:  # checkpointing saves memory where it is scarce
        checkpointing = requested_checkpointing(job)
        return _with_checkpointing(
            job, machine.kind == "cuda" if checkpointing is None else checkpointing
        ), None
    if not planned.forecast.fits:
        raise CapacityError(planned.summary)
    log.info("memory plan: %s", planned.summary)
    run = planned.forecast.run
    if run.compact:
        hardware.return_freed_memory()
    job = _with_checkpointing(job, run.checkpointing)
    return job.model_copy(update={"tokens_per_pass": run.tokens}), planned.forecast.total_bytes


def _plan_if_known(
    job: TuningJob, machine: Hardware, processes: int, rows: Sequence[TokenizedSequence] = ()
) -> MemoryPlan | None:
    try:
        return plan(job, machine, processes=processes, rows=rows)
    except ConfigError as error:
        log.warning("no memory plan: %s", error)
        return None


def _with_checkpointing(job: TuningJob, checkpointing: bool) -> TuningJob:
    training = {key: value for key, value in job.training.items() if key != "activation_checkpointing"}
    return job.model_copy(update={"training": {**training, "gradient_checkpointing": checkpointing}})


def _run(job: TuningJob, shape: Shape, machine: Hardware, *, processes: int, row_tokens: int) -> TuningRun:
    packed = families.find(shape.model_type).packed and job.encoding.batching != "sorted"
    quantization = job.quantization
    return TuningRun(
        tokens=max(row_tokens, pass_tokens(job, machine)),
        row_tokens=row_tokens,
        dtype=choose_dtype(job, machine),
        device=machine.kind,
        bits=quantization.bits if quantization else None,
        double_quant=quantization.double_quant if quantization else False,
        rank=job.lora.r,
        targets=job.lora.targets,
        patterned=_patterned(job, shape),
        dropout=bool(job.lora.dropout),
        optimizer=str(job.training.get("optim", DEFAULTS["optim"])),
        checkpointing=bool(requested_checkpointing(job)),
        packed=packed,
        processes=processes,
    )


_PATTERNS = ("rank_pattern", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def _patterned(job: TuningJob, shape: Shape) -> int | None:
    """Return the adapter's weights where the job has patterns of modules, else None."""
    given = {key: value for key, value in job.lora.options.items() if key in _PATTERNS and value}
    expression = isinstance(job.lora.targets, str) and job.lora.targets != "all-linear"
    if not given and not expression:
        return None
    targets = job.lora.targets if isinstance(job.lora.targets, str) else list(job.lora.targets)
    fields = parse(LoraFields, {"r": job.lora.r, "target_modules": targets} | given, "LoraConfig")
    return patterned(shape, fields)


def _advice(job: TuningJob, planned: MemoryPlan) -> tuple[str, ...]:
    """Return what would make it fit, the mildest first; each was computed to."""
    shape, room = planned.shape, planned.forecast.available_bytes
    advice: list[str] = []
    checkpointed = replace(planned.requested, checkpointing=True, row_tokens=shape.context_tokens)
    row_tokens = planned.adjustable.row_tokens
    free = Adjustable(row_tokens)
    if job.fit == "refuse" and fitting.choose(shape, planned.requested, free, room=room).fits:
        advice.append("--fit adapts checkpointing and pass size to the memory")
    length = fitting.largest_tokens(shape, checkpointed, room=room)
    if fitting.LEAST_ROW <= length < row_tokens:
        advice.append(f"max_length {length} with --fit would fit")
    if planned.requested.bits != 4:
        four_bit = replace(checkpointed, bits=4, double_quant=True)
        if fitting.choose(shape, four_bit, free, room=room).fits:
            advice.append("method qlora with load_in_4bit would fit")
    advice.append(_larger_device(planned, free))
    return tuple(advice)


def _larger_device(planned: MemoryPlan, free: Adjustable) -> str:
    """Return which device would hold the job: memory on a CPU, or a known GPU."""
    shape, requested = planned.shape, planned.requested
    if planned.machine.kind == "cpu":
        one_row = replace(requested, tokens=free.row_tokens)
        least = fitting.choose(shape, one_row, free, room=0).total_bytes
        return f"{least / fitting.USABLE['cpu'] / GIB:.1f} GiB of memory would do"
    names = gpus_that_fit(shape, requested, planned.adjustable)
    return f"a larger GPU, such as {names[0]}" if names else "no single GPU known here would hold it"


def gpus_that_fit(shape: Shape, run: TuningRun, adjustable: Adjustable) -> tuple[str, ...]:
    """Return the GPUs of clouds that one process of `run` fits into and computes rightly, smallest first."""
    on_gpu = replace(run, device="cuda", dtype="float16" if run.device == "cpu" else run.dtype)
    half = run.dtype != "float32" and not support.stays_within_float16(shape.model_type, training=True)
    return tuple(
        gpu.name
        for gpu in map(gpus.of_kind, gpus.rented())
        if not (half and not hardware.has_bfloat16(gpu))
        and fitting.choose(shape, on_gpu, adjustable, room=fitting.available(gpu)).fits
    )
