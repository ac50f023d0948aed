"""`runtime plan`: does a tuning job or a server fit, with which settings, and why; before a GPU is rented.

Knows flags and how a plan looks. The arithmetic lies in runtime/memory, the choice in runtime/tuning/fit.py.
Imports no torch. Start at `plan`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime import hardware
from runtime.cli import render
from runtime.cli.tune import Config, Processes, Set, set_flags
from runtime.errors import CapacityError, exit_code
from runtime.hardware import Hardware
from runtime.memory.tuning import MemoryItem

GIB = 2**30

Target = Annotated[
    str,
    typer.Argument(
        metavar="FILE|MODEL", help="A Workspace manifest (tuning or inference), or a model to tune."
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="GPU|auto",
        help=f"Plan for this GPU: {', '.join(hardware.names())}; or auto, what this machine has. "
        "By default what the manifest's instanceType has, else auto.",
    ),
]
Serve = Annotated[bool, typer.Option("--serve", help="With a model: plan a server, not a tuning job.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, sizes in bytes.")]


def plan(  # noqa: PLR0913, PLR0917 - a command line has as many parameters as flags
    context: typer.Context,
    target: Target,
    gpu: Gpu = None,
    serve: Serve = False,
    config: Config = None,
    settings: Set = None,
    processes: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Say how much memory a job or a server takes, and what fits. Exit status 6 when it does not."""
    from runtime.workspace.manifest import is_manifest

    machine = _machine(target, gpu) if is_manifest(target) else _named(gpu)
    overrides = set_flags(settings or [])
    if is_manifest(target):
        from runtime.workspace.manifest import read

        serve = read(Path(target)).workspace.inference is not None
    if serve:
        fits = _server(context, target, machine, overrides, as_json)
    else:
        fits = _job(context, target, machine, (overrides, config, processes), as_json)
    if not fits:
        raise typer.Exit(exit_code(CapacityError()))


def _named(gpu: str | None) -> Hardware:
    return hardware.detect() if gpu in (None, "auto") else hardware.named(gpu or "")


def _machine(manifest: str, gpu: str | None) -> Hardware:
    from runtime.workspace.instances import gpus_of

    rented = gpus_of(Path(manifest)) if gpu is None else None
    return hardware.named(rented[0], count=rented[1]) if rented else _named(gpu)


def _job(
    context: typer.Context,
    target: str,
    machine: Hardware,
    given: tuple[dict[str, Any], Path | None, int | None],
    as_json: bool,
) -> bool:
    """Show a tuning job's plan; return whether it fits."""
    from runtime.tuning import fit as fits
    from runtime.workspace import load_job

    overrides, config, processes = given
    overrides.setdefault("data.folder", Path("/mnt/data"))  # a plan needs no rows
    resolved = load_job(target, environ=context.obj or {}, config=config, overrides=overrides)
    fit = fits.plan(resolved.config, machine, processes=processes)
    chosen, run = fit.chosen, fit.chosen.run
    facts: dict[str, Any] = {
        "fits": chosen.fits,
        "device": machine.name,
        "total_bytes": chosen.total_bytes,
        "available_bytes": chosen.available_bytes,
        "dtype": run.dtype,
        "row_tokens": chosen.row_tokens,
        "tokens_per_pass": run.tokens,
        "gradient_checkpointing": run.checkpointing,
        "largest_tokens_per_pass": fit.largest_tokens,
        "longest_row_that_fits": fit.longest_row,
        "fits_on": list(fits.fits_on(fit.shape, fit.asked, fit.wish)),
        "advice": list(fit.advice),
    }
    if as_json:
        _as_json(facts, chosen.parts)
        return chosen.fits
    typer.echo(
        f"{resolved.config.name}: {resolved.config.method} of {fit.shape.name} on {_described(machine)}\n"
    )
    _table(chosen.parts, chosen.total_bytes, chosen.available_bytes)
    how = "on" if run.checkpointing else "off"
    typer.echo(
        f"Settings: {run.dtype}, rows of at most {chosen.row_tokens} tokens, {run.tokens} tokens in a pass, "
        f"gradient checkpointing {how}."
    )
    if chosen.fits:
        typer.echo(
            f"With them {fit.largest_tokens} tokens in a pass would fit; with checkpointing rows of up to "
            f"{fit.longest_row} tokens."
        )
    typer.echo(f"One of these is enough: {', '.join(facts['fits_on']) or 'none known here'}.")
    _verdict(chosen.fits, fit.line)
    return chosen.fits


def _server(
    context: typer.Context, target: str, machine: Hardware, overrides: dict[str, Any], as_json: bool
) -> bool:
    """Show a server's plan; return whether it fits."""
    from runtime.memory import serving, shape
    from runtime.workspace import load_server

    config = load_server(target, environ=context.obj or {}, overrides=overrides).config
    model, quantization = shape.of(config.model), config.quantization
    wanted = serving.ServingRun(
        rows=config.limits.rows,
        context_tokens=config.limits.context_tokens or model.context_tokens,
        least_context_tokens=config.limits.context_tokens or serving.LEAST_CONTEXT_TOKENS,
        dtype=hardware.compute_dtype(machine, config.model.dtype),
        bits=quantization.bits if quantization else None,
        double_quant=bool(quantization and quantization.double_quant),
    )
    capacity = serving.forecast(model, wanted, machine)
    rows = f"{capacity.rows} rows of {capacity.context_tokens} tokens"
    facts: dict[str, Any] = {
        "fits": capacity.fits,
        "device": machine.name,
        "available_bytes": capacity.room_bytes,
        "dtype": wanted.dtype,
        "rows": capacity.rows,
        "context_tokens": capacity.context_tokens,
        "cache_bytes_per_token": capacity.token_bytes,
        "fits_on": list(serving.fits_on(model, wanted)),
    }
    if as_json:
        _as_json(facts, capacity.parts)
        return capacity.fits
    typer.echo(f"Server of {config.served_name} on {_described(machine)}\n")
    _table(capacity.parts, sum(part.size_bytes for part in capacity.parts), capacity.room_bytes)
    typer.echo(f"Asked for: {wanted.rows} rows of {wanted.context_tokens} tokens, {wanted.dtype}.")
    typer.echo(f"One of these is enough for a row: {', '.join(facts['fits_on']) or 'none known here'}.")
    advice = "quantise it (--set quantization.bits=4), or take a larger GPU"
    _verdict(
        capacity.fits, f"{rows}" if capacity.fits else f"{model.name} leaves no room for a row; {advice}"
    )
    return capacity.fits


def _described(machine: Hardware) -> str:
    kind = f"{machine.count} x {machine.name}" if machine.count > 1 else machine.name
    return f"{kind} ({machine.memory_bytes / GIB:.1f} GiB{' each' if machine.count > 1 else ''})"


def _table(parts: Iterable[MemoryItem], total: int, available: int) -> None:
    rows = [(part.name, f"{part.size_bytes / GIB:8.2f}", part.how) for part in parts]
    rows += [("total", f"{total / GIB:8.2f}", ""), ("usable", f"{available / GIB:8.2f}", "")]
    render.table(("part", "     GiB", "how"), rows)
    typer.echo()


def _verdict(fits: bool, line: str) -> None:
    if fits:
        typer.echo(f"Fits: {line}")
    else:
        typer.echo(f"Does not fit: {line}", err=True)


def _as_json(facts: dict[str, Any], parts: Iterable[MemoryItem]) -> None:
    listed = [
        {"name": part.name, "bytes": part.size_bytes, "how": part.how, "reclaimable": part.reclaimable}
        for part in parts
    ]
    typer.echo(json.dumps({**facts, "parts": listed}, indent=2))
