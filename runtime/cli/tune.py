"""`runtime tune`: resolve the job, show it or run it.

Knows flags. Which settings they are lies in runtime/workspace. Start at `tune`.
"""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from runtime import ports
from runtime.cli import next_steps, render
from runtime.cli.options import (
    Config,
    Debug,
    DryRun,
    DryRunAsJson,
    Processes,
    RequireSignature,
    Set,
    set_flags,
    without_defaults,
)
from runtime.errors import Failure, StoppedError, exit_code
from runtime.tuning.output import check_replaceable
from runtime.tuning.process.nodes import Nodes
from runtime.tuning.settings import TuningJob
from runtime.workspace import load_job
from runtime.workspace.layers import Resolved
from runtime.workspace.mounts import in_pod
from runtime.workspace.runs import place

log = logging.getLogger(__name__)

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="FILE|MODEL",
        help="A Workspace manifest; or a preset, a repository id or a model directory. "
        "Left out in a controller's pod, where the mounts describe the job.",
    ),
]
Preview = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Show N rows as the model sees them, and train nothing."),
]
Output = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR|IMAGE",
        help="Where the adapter goes: a directory, oci:DIRECTORY[:tag], or registry/repository:tag.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace another job's adapter in the directory, when this one is done."
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE|DIR|URL|IMAGE", help="Training rows, instead of the manifest's input."),
]
OnBadRow = Annotated[
    str | None, typer.Option(metavar="fail|skip", help="What to do with a row that cannot be read.")
]
MaxDataBytes = Annotated[
    str | None,
    typer.Option(
        metavar="QUANTITY",
        help="Most bytes of all data, as sent and as unpacked, such as 20Gi. "
        "By default what the free disk and the memory allow.",
    ),
]
Credentials = Annotated[Path | None, typer.Option(help="Docker config.json with the registry's credentials.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Use plain HTTP for the registry.")]
Sign = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY", help="Sign the image as cosign does, with this private key (ECDSA"
                 " P-256, PEM); its passphrase is read from COSIGN_PASSWORD."),
]  # fmt: skip
CheckpointImage = Annotated[
    str | None,
    typer.Option(metavar="IMAGE", help="Push checkpoints to this image too, to resume on another node."),
]
KeepCheckpoints = Annotated[
    bool, typer.Option("--keep-checkpoint-image", help="Keep the checkpoint image after success.")
]
Parallel = Annotated[
    str | None,
    typer.Option(
        metavar="ddp|fsdp",
        help="With several GPUs: each holds the whole base model (ddp), or a slice of it (fsdp).",
    ),
]
NodeCount = Annotated[
    int | None, typer.Option("--nnodes", min=1, help="Machines of this job; each runs this command.")
]
NodeRank = Annotated[
    int | None, typer.Option(min=0, help="Number of this machine; 0 writes and pushes the adapter.")
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--rdzv-endpoint",
        metavar="HOST[:PORT]",
        help=f"Address of machine 0, where all meet; port {ports.RENDEZVOUS} by default.",
    ),
]
Fit = Annotated[
    bool,
    typer.Option(
        "--fit",
        help="Adapt pass size and gradient checkpointing to the memory; --set fit=shorten also cuts rows.",
    ),
]


def tune(  # noqa: PLR0913, PLR0917 - a command line has as many parameters as flags
    context: typer.Context,
    target: Target = None,
    dry_run: DryRun = False,
    as_json: DryRunAsJson = False,
    preview: Preview = None,
    config: Config = None,
    settings: Set = None,
    output: Output = None,
    overwrite: Overwrite = False,
    data: Data = None,
    on_bad_row: OnBadRow = None,
    max_data_bytes: MaxDataBytes = None,
    credentials: Credentials = None,
    insecure: Insecure = False,
    sign: Sign = None,
    require_signature: RequireSignature = None,
    checkpoint_image: CheckpointImage = None,
    keep_checkpoint_image: KeepCheckpoints = False,
    processes: Processes = None,
    parallel: Parallel = None,
    nnodes: NodeCount = None,
    node_rank: NodeRank = None,
    rdzv_endpoint: Endpoint = None,
    fit: Fit = False,
    debug: Debug = False,
) -> None:
    """Tune a model and push the adapter: QLoRA from a Workspace manifest, or from flags alone."""
    given = locals()
    flags = {setting: given[name] for name, setting in SETTING_OF.items()} | {"fit": fit and "adapt"}
    environ, overrides = context.obj or {}, set_flags(settings) | without_defaults(flags)
    nodes = Nodes.read(environ, count=nnodes, rank=node_rank, endpoint=rdzv_endpoint)
    resolved = place(load_job(target, environ=environ, config=config, overrides=overrides), nodes=nodes.count)
    if dry_run:
        return _dry_run(resolved, nodes, as_json=as_json)
    if preview is None:
        return _launch(resolved, nodes, processes=processes, environ=environ)
    return _preview(resolved.config, preview, environ=environ)


SETTING_OF = {
    "output": "--output", "data": "--data", "on_bad_row": "data.on_bad_row",
    "max_data_bytes": "data.max_bytes",
    "credentials": "output.credentials", "insecure": "output.insecure", "overwrite": "output.overwrite",
    "sign": "output.sign_key", "require_signature": "model.required_keys", "parallel": "parallel",
    "checkpoint_image": "output.checkpoint_image", "keep_checkpoint_image": "output.keep_checkpoint_image",
}  # fmt: skip
"""The setting that each parameter of `tune` stands for, of those whose value is taken as it is."""


def _dry_run(resolved: Resolved[TuningJob], nodes: Nodes, *, as_json: bool) -> None:
    if nodes.is_main:
        check_replaceable(resolved.config)
    render.dry_run(resolved, render.tuning_job, as_json=as_json)


def _launch(
    resolved: Resolved[TuningJob], nodes: Nodes, *, processes: int | None, environ: Mapping[str, str]
) -> None:
    from runtime.tuning import launcher, publish

    job = resolved.ready()
    resolved.warn()
    try:
        launcher.run(job, processes=processes, nodes=nodes, access=publish.access_of(job, environ))
    except Failure as failure:
        stopped = isinstance(failure, StoppedError)
        if sys.stderr.isatty() and not stopped:
            raise  # said like every command's failure
        # the last line of a pod's log, in the same form as all others
        log.log(logging.WARNING if stopped else logging.ERROR, "%s", failure)
        raise typer.Exit(exit_code(failure)) from None
    if nodes.is_main and not in_pod(environ):
        _next_steps(job)


def _next_steps(job: TuningJob) -> None:
    from runtime.tuning.report import report

    if (written := report.read(job.output.folder)) is not None:
        if said := written["not_served"]:
            typer.echo(f"\n{said[0].upper()}{said[1:]}.")
        if steps := next_steps.after_tuning(job, written, with_question=sys.stdout.isatty()):
            typer.echo("\nNext, from this directory:\n")
            for line in steps:
                typer.echo(f"  {line}")


def _preview(job: TuningJob, count: int, *, environ: Mapping[str, str]) -> None:
    from runtime.tuning import publish
    from runtime.tuning.data.preview import preview

    render.preview(preview(job, count=count, access=publish.access_of(job, environ)))
