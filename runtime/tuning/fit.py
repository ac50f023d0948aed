"""A job's memory plan: what it asks for, which settings are chosen on this hardware, what would help.

Turns settings into the numbers of runtime/memory and its answer back into settings. The parent process
refuses by it before data is fetched, each worker chooses by it when the rows are known. Start at `plan`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime import families, hardware
from runtime.errors import CapacityError, ConfigError
from runtime.hardware import Hardware
from runtime.memory import fitting
from runtime.memory.fitting import Adjustable, Forecast
from runtime.memory.shape import Shape, of
from runtime.memory.tuning import TuningRun
from runtime.tuning.data.tokenize import MAX_TOKENS, TokenizedRow
from runtime.tuning.precision import choose_dtype
from runtime.tuning.settings import TuningJob
from runtime.tuning.train.schedule import pass_tokens, requested_checkpointing
from runtime.tuning.training_arguments import DEFAULTS

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Fit:
    """A job on some hardware: what it would take, and what was or could be chosen."""

    shape: Shape
    machine: Hardware
    asked: TuningRun
    """As the job says, before anything was chosen."""
    wish: Adjustable
    chosen: Forecast
    advice: tuple[str, ...]
    """What would make it fit, when it does not."""

    @property
    def largest_tokens(self) -> int:
        """Most tokens of one pass that fit with the chosen settings."""
        return fitting.largest_tokens(self.shape, self.chosen.run, room=self.chosen.available_bytes)

    @property
    def longest_row(self) -> int:
        """Longest row that fits, alone in a pass and with checkpointing; the model's context at most."""
        run = replace(self.chosen.run, checkpointing=True, row_tokens=self.shape.context_tokens)
        length = fitting.largest_tokens(self.shape, run, room=self.chosen.available_bytes)
        return min(length, self.shape.context_tokens)

    @property
    def line(self) -> str:
        """The outcome in one line, the advice with it."""
        need, room = self.chosen.total_bytes / GIB, self.chosen.available_bytes / GIB
        where = f"{self.machine.name} ({room:.1f} GiB usable)"
        passes = f"passes of {self.chosen.run.tokens} tokens"
        how = f"{passes} {'with' if self.chosen.run.checkpointing else 'without'} gradient checkpointing"
        if self.chosen.fits:
            return f"{need:.1f} GiB on {where}: {how}"
        return f"{self.shape.name} needs {need:.1f} GiB for {how} on {where}; {', or '.join(self.advice)}"


def plan(
    job: TuningJob, machine: Hardware, *, processes: int | None = None, rows: Sequence[TokenizedRow] = ()
) -> Fit:
    """Return the plan of `job` on `machine` with `processes` there (None: one for each GPU).

    Without `rows` every row is taken to be as long as it may be, and all of it learnt. Raises ConfigError
    when the model's shape cannot be told.
    """
    shape = of(job.model)
    count = processes or machine.count
    longest = max((len(row) for row in rows), default=0)
    row_tokens = longest or job.encoding.max_tokens or min(shape.context_tokens, MAX_TOKENS)
    asked = _run(job, shape, machine, processes=count, row_tokens=row_tokens)
    if rows:
        asked = replace(asked, labelled_share=max(row.targets / len(row) for row in rows))
    word = requested_checkpointing(job)
    wish = Adjustable(
        row_tokens,
        checkpointing=word if word or job.fit == "refuse" else None,
        smaller_passes=job.fit != "refuse" or "per_device_train_batch_size" not in job.training,
        shorter_rows=job.fit == "shorten" and not rows,
    )
    room = fitting.available(machine, processes=count)
    chosen = fitting.choose(shape, asked, wish, room=room)
    advice = () if chosen.fits else _advice(job, Fit(shape, machine, asked, wish, chosen, ()))
    return Fit(shape, machine, asked, wish, chosen, advice)


def check(job: TuningJob, machine: Hardware, *, processes: int | None = None) -> None:
    """Say what `job` will take; CapacityError, with advice, when it cannot fit on `machine`."""
    fit = _plan_if_known(job, machine, processes or machine.count)
    if fit is not None and not fit.chosen.fits:
        raise CapacityError(fit.line)
    if fit is not None:
        log.info("memory plan: %s", fit.line)


def shorten(job: TuningJob, machine: Hardware, *, processes: int) -> TuningJob:
    """Return `job` with its rows cut as short as its memory needs, where it allows that."""
    fit = _plan_if_known(job, machine, processes) if job.fit == "shorten" else None
    if fit is None or fit.chosen.row_tokens == fit.wish.row_tokens:
        return job
    log.warning("rows are cut at %d tokens, not %d, to fit", fit.chosen.row_tokens, fit.wish.row_tokens)
    encoding = job.encoding.model_copy(update={"max_tokens": fit.chosen.row_tokens})
    return job.model_copy(update={"encoding": encoding})


def settle(
    job: TuningJob, machine: Hardware, *, processes: int, rows: Sequence[TokenizedRow]
) -> tuple[TuningJob, int | None]:
    """Return `job` with the pass size and the checkpointing that fit for these `rows`, and the bytes planned.

    The same on every rank: it depends on lengths and on the kind of device alone. None bytes without a
    plan. Raises CapacityError when nothing fits.
    """
    fit = _plan_if_known(job, machine, processes, rows)
    if fit is None:  # the thrifty way where memory is dear
        word = requested_checkpointing(job)
        return _with_checkpointing(job, machine.kind == "cuda" if word is None else word), None
    if not fit.chosen.fits:
        raise CapacityError(fit.line)
    log.info("memory: %s", fit.line)
    run = fit.chosen.run
    if run.compact:
        hardware.return_freed_memory()
    job = _with_checkpointing(job, run.checkpointing)
    return job.model_copy(update={"tokens_per_pass": run.tokens}), fit.chosen.total_bytes


def _plan_if_known(
    job: TuningJob, machine: Hardware, processes: int, rows: Sequence[TokenizedRow] = ()
) -> Fit | None:
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
        dropout=bool(job.lora.dropout),
        optimizer=str(job.training.get("optim", DEFAULTS["optim"])),
        checkpointing=bool(requested_checkpointing(job)),
        packed=packed,
        processes=processes,
    )


def _advice(job: TuningJob, fit: Fit) -> tuple[str, ...]:
    """Return what would make it fit, the mildest first; each was computed to."""
    shape, room = fit.shape, fit.chosen.available_bytes
    found: list[str] = []
    thrifty = replace(fit.asked, checkpointing=True, row_tokens=shape.context_tokens)
    free = Adjustable(fit.wish.row_tokens)
    if job.fit == "refuse" and fitting.choose(shape, fit.asked, free, room=room).fits:
        found.append("--fit adapts checkpointing and pass size to the memory")
    length = fitting.largest_tokens(shape, thrifty, room=room)
    if fitting.LEAST_ROW <= length < fit.wish.row_tokens:
        found.append(f"max_length {length} with --fit would fit")
    if fit.asked.bits != 4:
        four = replace(thrifty, bits=4, double_quant=True)
        if fitting.choose(shape, four, free, room=room).fits:
            found.append("method qlora with load_in_4bit would fit")
    found.append(_other_device(shape, fit, free))
    return tuple(found)


def _other_device(shape: Shape, fit: Fit, free: Adjustable) -> str:
    if fit.machine.kind == "cpu":
        least = fitting.choose(shape, replace(fit.asked, tokens=free.row_tokens), free, room=0).total_bytes
        return f"{least / fitting.USABLE['cpu'] / GIB:.1f} GiB of memory would do"
    names = fits_on(shape, fit.asked, fit.wish)
    return f"a larger GPU, such as {names[0]}" if names else "no single GPU known here would hold it"


def fits_on(shape: Shape, run: TuningRun, wish: Adjustable) -> tuple[str, ...]:
    """Return the known GPUs that one process of `run` fits into, smallest first."""
    rooms = ((name, fitting.available(hardware.named(name))) for name in hardware.names())
    on_gpu = replace(run, device="cuda", dtype="float16" if run.device == "cpu" else run.dtype)
    return tuple(name for name, room in rooms if fitting.choose(shape, on_gpu, wish, room=room).fits)
