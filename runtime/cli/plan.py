"""`runtime plan`: does a tuning job or a server fit, with which settings, and why; before a GPU is rented.

Knows flags and how a report looks. The arithmetic lies in runtime/memory, the choice of settings in
runtime/tuning/fit.py. Imports no torch. Start at `plan`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime import gpus, support, torch_build
from runtime.cli import render
from runtime.cli.options import Config, Debug, Processes, Set, set_flags
from runtime.errors import CapacityError, ConfigError, exit_code
from runtime.hardware import Hardware
from runtime.memory import serving, shape
from runtime.memory.tuning import MemoryItem
from runtime.serving import fit
from runtime.tuning.settings import TuningJob
from runtime.workspace import load_job, load_server, mixups
from runtime.workspace.instances import gpus_of
from runtime.workspace.manifest import WorkspaceDocuments, is_manifest, read

GIB = 2**30
MOST_NAMED = 6
"""GPUs that a line for people names."""

Target = Annotated[
    str,
    typer.Argument(
        metavar="FILE|MODEL", help="A Workspace manifest (tuning or inference), or a model to tune."
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="GPU|TYPE|SIZE|auto",
        help=f"Plan for these GPUs: {gpus.EXAMPLES}, each also as '2x NAME'; or auto, those of this machine. "
        "By default those of the manifest's instanceType; for a model, auto.",
    ),
]
Serve = Annotated[
    bool, typer.Option("--serve", help="Plan a server, of a model or of the inference Workspace in FILE.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, sizes in bytes.")]


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What a job or a server takes on a machine, ready to print."""

    fits: bool
    title: str
    items: tuple[MemoryItem, ...]
    total_bytes: int
    available_bytes: int
    notes: tuple[str, ...]
    """Lines below the table."""
    verdict: str
    facts: Mapping[str, Any]
    """What --json prints, beside the items."""

    @property
    def estimated_bytes(self) -> int:
        """What of the total is an estimate."""
        return sum(it.size_bytes for it in self.items if it.basis == "estimated" and not it.reclaimable)


def plan(  # noqa: PLR0913, PLR0917 - a command line has as many parameters as flags
    context: typer.Context,
    target: Target,
    gpu: Gpu = None,
    serve: Serve = False,
    config: Config = None,
    settings: Set = None,
    processes: Processes = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show how much memory a job or a server takes, and what fits. Exit status 6 when it does not."""
    environ, overrides = context.obj or {}, set_flags(settings)
    if mixups.is_data(target):
        raise ConfigError(f"{target} is data; `runtime plan` takes a model or a manifest")
    manifest = read(Path(target), "inference" if serve else "tuning") if is_manifest(target) else None
    machine, assumed = _machine(manifest, gpu)
    if manifest is not None:
        serve = manifest.work == "inference"
    if serve:
        report = server_report(target, machine, environ=environ, config=config, overrides=overrides)
    else:
        job = _job(target, environ, config, overrides)
        report = job_report(job, machine, processes=processes)
    if assumed:
        report = replace(report, notes=(assumed, *report.notes), facts={**report.facts, "assumed": assumed})
    if as_json:
        estimated = {"estimated_bytes": report.estimated_bytes}
        typer.echo(json.dumps({**report.facts, **estimated, "parts": _json_items(report.items)}, indent=2))
    else:
        _print(report)
    if not report.fits:
        raise typer.Exit(exit_code(CapacityError()))


def job_report(job: TuningJob, machine: Hardware, *, processes: int | None) -> MemoryReport:
    """Return the memory plan of a tuning job on `machine`."""
    from runtime.tuning import fit as fits

    fit = fits.plan(job, machine, processes=processes)
    chosen, run = fit.forecast, fit.forecast.run
    facts: dict[str, Any] = {
        "fits": chosen.fits,
        "device": machine.name,
        "total_bytes": chosen.total_bytes,
        "available_bytes": chosen.available_bytes,
        "dtype": run.dtype,
        "row_tokens": chosen.row_tokens,
        "tokens_per_pass": run.tokens,
        "pass_size": fit.pass_size,
        "gradient_checkpointing": run.checkpointing,
        "largest_tokens_per_pass": fit.largest_tokens,
        "longest_row_that_fits": fit.longest_row,
        "fits_on": list(fits.gpus_that_fit(fit.shape, fit.requested, fit.adjustable)),
        "advice": list(fit.advice),
    }
    return MemoryReport(
        fits=chosen.fits,
        title=f"{job.name}: {job.method} of {fit.shape.name} on {_described(machine)}",
        items=tuple(chosen.parts),
        total_bytes=chosen.total_bytes,
        available_bytes=chosen.available_bytes,
        notes=_job_notes(facts),
        verdict=fit.summary,
        facts=facts,
    )


def _job_notes(facts: Mapping[str, Any]) -> tuple[str, ...]:
    settings = (
        f"Settings: {facts['dtype']}, rows of at most {facts['row_tokens']} tokens, "
        f"{facts['tokens_per_pass']} tokens in a pass (one forward and backward computation on a GPU: "
        f"{facts['pass_size']}), "
        f"gradient checkpointing {'on' if facts['gradient_checkpointing'] else 'off'}."
    )
    largest = (
        f"With them {facts['largest_tokens_per_pass']} tokens in a pass would fit; with checkpointing rows "
        f"of up to {facts['longest_row_that_fits']} tokens."
    )
    enough = f"One of these is enough: {_few(facts['fits_on'])}."
    return (settings, largest, enough) if facts["fits"] else (settings, enough)


def server_report(
    target: str,
    machine: Hardware,
    *,
    environ: Mapping[str, str],
    config: Path | None,
    overrides: Mapping[str, Any],
) -> MemoryReport:
    """Return the memory plan of the server that `target` describes on `machine`."""
    resolved = load_server(target, environ=environ, config=config, overrides=overrides)
    server = resolved.config
    support.check_server(server.model, server.quantization, machine, engine=server.engine)
    model = shape.of(server.model)
    layout = fit.lay_out(server, machine, model)
    capacity, run = layout.capacity, layout.run
    warnings = tuple(dict.fromkeys((*resolved.warnings, *fit.warnings(layout, server, model))))
    facts = _server_facts(layout, model, machine) | {"warnings": list(warnings)}
    return MemoryReport(
        fits=capacity.fits,
        title=f"Server of {server.served_name} on {_described(machine)}",
        items=tuple(capacity.parts),
        total_bytes=sum(item.size_bytes for item in capacity.parts),
        available_bytes=capacity.available_bytes,
        notes=(
            *_placed(layout, machine, is_divided_by_default=not fit.is_laid_out(server)),
            f"Requested: up to {run.sequences} sequences of up to {run.context_tokens} tokens, {run.dtype}.",
            f"One of these is enough for one sequence: {_few(facts['fits_on'])}.",
            *(f"Warning: {warning}" for warning in warnings),
        ),
        verdict=_served(model, run, capacity)
        if capacity.fits
        else f"{model.name} leaves no memory for one sequence; {_advice(model, layout, machine)}",
        facts=facts,
    )


def _server_facts(layout: fit.ServerLayout, model: shape.Shape, machine: Hardware) -> dict[str, Any]:
    capacity, run = layout.capacity, layout.run
    return {
        "fits": layout.fits,
        "device": machine.name,
        "gpus": layout.gpus,
        "processes": run.processes,
        "replicas": run.copies,
        "servers": layout.servers,
        "available_bytes": capacity.available_bytes,
        "dtype": run.dtype,
        "rows": capacity.sequences,
        "context_tokens": capacity.context_tokens,
        "cache_tokens": capacity.cache_tokens,
        "cache_bytes_per_token": capacity.token_bytes,
        "fits_on": list(serving.fits_on(model, run)),
    }


def _placed(layout: fit.ServerLayout, machine: Hardware, *, is_divided_by_default: bool) -> Iterator[str]:
    """Yield how the server is laid over the GPUs, and what the figures are of."""
    run, device = layout.run, "GPU" if machine.kind == "cuda" else "process"
    if run.processes > 1:
        flags = f" (serve --parallel tp --processes {run.processes})" if is_divided_by_default else ""
        yield f"One model is divided among {run.processes} {device}s{flags}; figures are of one {device}."
    if run.copies > 1:
        where = "on GPUs of their own" if machine.kind == "cuda" else "in equal parts of the memory"
        yield f"There are {run.copies} copies of the model, {where}; figures are of one {device}."
    if layout.servers > 1:
        yield f"{layout.servers} such servers have place on the {machine.count} GPUs of a node."
    if layout.indivisible:
        yield f"The model is not divided among more GPUs: {layout.indivisible}."


def _served(model: shape.Shape, run: serving.ServingRun, capacity: serving.Capacity) -> str:
    if serving.batched(model, run):
        return (
            f"up to {capacity.sequences} sequences of up to {capacity.context_tokens} tokens, "
            f"{capacity.cache_tokens} of all together"
        )
    return f"one request at a time, of {capacity.context_tokens} tokens"


def _advice(model: shape.Shape, layout: fit.ServerLayout, machine: Hardware) -> str:
    """Return what would make a server fit."""
    whole = model.quantized is None and layout.run.bits is None
    quantised = replace(layout.run, bits=4, double_quant=True, processes=1)
    if whole and serving.forecast(model, quantised, machine).fits:
        return "quantise it (--set quantization.bits=4), or take a larger GPU"
    return "take a larger GPU"


def _job(
    target: str, environ: Mapping[str, str], config: Path | None, overrides: dict[str, Any]
) -> TuningJob:
    overrides.setdefault("data.folder", Path("/mnt/data"))  # a plan needs no rows
    return load_job(target, environ=environ, config=config, overrides=overrides).config


def _machine(manifest: WorkspaceDocuments | None, gpu: str | None) -> tuple[Hardware, str | None]:
    """Return the machine to plan for, and what is assumed of it."""
    if gpu is None and manifest is not None:
        return gpus_of(manifest), None
    if gpu in (None, "auto"):
        return torch_build.usable_hardware(), None
    found = gpus.named(gpu or "")
    machine = gpus_of(manifest, found.hardware) if manifest is not None else found.hardware
    return machine, found.assumed


def _few(names: Sequence[str]) -> str:
    """Return the smallest of the GPUs that fit, for people."""
    more = ", and larger ones" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more if names else "none known here"


def _described(machine: Hardware) -> str:
    kind = f"{machine.count} x {machine.name}" if machine.count > 1 else machine.name
    return f"{kind} ({machine.memory_bytes / GIB:.1f} GiB{' each' if machine.count > 1 else ''})"


def _print(report: MemoryReport) -> None:
    typer.echo(f"{report.title}\n")
    rows: list[tuple[str, ...]] = [
        (item.name, f"{item.size_bytes / GIB:8.2f}", item.basis, item.how) for item in report.items
    ]
    guessed = f"{report.estimated_bytes / GIB:.2f} GiB of it estimated"
    rows += [("total", f"{report.total_bytes / GIB:8.2f}", "", guessed)]
    rows += [("usable", f"{report.available_bytes / GIB:8.2f}", "", "")]
    render.table(("part", "     GiB", "basis", "how"), rows)
    typer.echo()
    for note in report.notes:
        typer.echo(note)
    if report.fits:
        typer.echo(f"Fits: {report.verdict}")
    else:
        typer.echo(f"Does not fit: {report.verdict}", err=True)


def _json_items(items: tuple[MemoryItem, ...]) -> list[dict[str, Any]]:
    return [
        {
            "name": item.name,
            "bytes": item.size_bytes,
            "basis": item.basis,
            "how": item.how,
            "reclaimable": item.reclaimable,
        }
        for item in items
    ]
