"""`runtime tune`: resolve the job, show it or run it.

Knows flags. What they mean lies in runtime/workspace. Start at `tune`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel

from runtime import ports
from runtime.cli import render
from runtime.config import yaml_documents
from runtime.errors import ConfigError, Failure, StoppedError, exit_code
from runtime.tuning.settings import TuningJob
from runtime.workspace.layers import Resolved

if TYPE_CHECKING:
    from runtime.tuning.process.nodes import Nodes

log = logging.getLogger(__name__)

Ready = TypeVar("Ready", bound=BaseModel)

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="FILE|MODEL",
        help="A Workspace manifest; or a preset, a repository id or a model directory. "
        "Nothing in a controller's pod, where the mounts say it all.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would run, and where each setting is from.")
]
Preview = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Show N rows as the model sees them, and train nothing."),
]
AsJson = Annotated[bool, typer.Option("--json", help="With --dry-run: as JSON.")]
Config = Annotated[Path | None, typer.Option(help="A training_config.yaml, or a ConfigMap that holds one.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One setting, e.g. lora.r=8 or TrainingArguments.seed=1."
    ),
]
Output = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR|IMAGE",
        help="Where the adapter goes: a directory, oci:DIRECTORY[:tag], or registry/repository:tag.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE|DIR|URL|IMAGE", help="Training rows, instead of the manifest's input."),
]
OnBadRow = Annotated[
    str | None, typer.Option(metavar="fail|skip", help="What to do with a row that cannot be read.")
]
Credentials = Annotated[Path | None, typer.Option(help="Docker config.json with the registry's credentials.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Speak plain HTTP to the registry.")]
CheckpointImage = Annotated[
    str | None,
    typer.Option(metavar="IMAGE", help="Keep checkpoints in a registry too, to go on from on another node."),
]
KeepCheckpoints = Annotated[
    bool, typer.Option("--keep-checkpoint-image", help="Leave the checkpoint image there after success.")
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Training processes on this machine; one per GPU by default.")
]
Parallel = Annotated[
    str | None,
    typer.Option(
        metavar="ddp|fsdp", help="Several GPUs: each holds the base model, or a slice of it (FSDP2)."
    ),
]
NodeCount = Annotated[
    int | None, typer.Option("--nnodes", min=1, help="Machines of this job; each runs this command.")
]
NodeRank = Annotated[
    int | None, typer.Option(min=0, help="Which of them this is; 0 writes and pushes the adapter.")
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--rdzv-endpoint",
        metavar="HOST[:PORT]",
        help=f"Address of node 0, where the nodes meet; port {ports.RENDEZVOUS} by default.",
    ),
]
Fit = Annotated[
    bool,
    typer.Option(
        "--fit", help="Adapt pass size and checkpointing to the memory; --set fit=shorten: rows too."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Log everything; show tracebacks.")]


def tune(  # noqa: PLR0913, PLR0917 - a command line has as many parameters as flags
    context: typer.Context,
    target: Target = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    preview: Preview = None,
    config: Config = None,
    settings: Set = None,
    output: Output = None,
    data: Data = None,
    on_bad_row: OnBadRow = None,
    credentials: Credentials = None,
    insecure: Insecure = False,
    checkpoint_image: CheckpointImage = None,
    keep_checkpoint_image: KeepCheckpoints = False,
    processes: Processes = None,
    parallel: Parallel = None,
    nnodes: NodeCount = None,
    node_rank: NodeRank = None,
    rdzv_endpoint: Endpoint = None,
    fit: Fit = False,
    debug: Debug = False,  # read by cli.run, before anything else
) -> None:
    """Tune a model and push the adapter: QLoRA from a Workspace manifest, or from flags alone."""
    from runtime.workspace import load_job

    overrides = set_flags(settings or [])
    named = {"--output": output, "--data": data, "data.on_bad_row": on_bad_row, "fit": fit and "adapt"}
    overrides |= {name: value for name, value in named.items() if value}
    if credentials is not None:
        overrides["output.credentials"] = credentials
    if insecure:
        overrides["output.insecure"] = True
    if checkpoint_image is not None:
        overrides["output.checkpoint_image"] = checkpoint_image
    if parallel is not None:
        overrides["parallel"] = parallel
    if keep_checkpoint_image:
        overrides["output.keep_checkpoint_image"] = True
    resolved = load_job(target, environ=context.obj, config=config, overrides=overrides)
    if dry_run:
        render.dry_run(resolved, render.job, as_json=as_json)
        return
    if preview is not None:
        _preview(resolved.config, preview, environ=context.obj or {})
        return
    job = ready(resolved)
    from runtime.tuning.process.nodes import Nodes

    environ = context.obj or {}
    nodes = Nodes.read(environ, count=nnodes, rank=node_rank, endpoint=rdzv_endpoint)
    _launch(job, nodes, processes=processes, environ=environ)


def _launch(job: TuningJob, nodes: "Nodes", *, processes: int | None, environ: Mapping[str, str]) -> None:
    from runtime.tuning import launcher, publish

    try:
        launcher.run(job, processes=processes, nodes=nodes, access=publish.access_of(job, environ))
    except Failure as failure:  # the last line of a pod's log, in the form of all others
        log.log(logging.WARNING if isinstance(failure, StoppedError) else logging.ERROR, "%s", failure)
        raise typer.Exit(exit_code(failure)) from None


def _preview(job: TuningJob, count: int, *, environ: Mapping[str, str]) -> None:
    from runtime.tuning import publish
    from runtime.tuning.data.preview import preview

    render.draw(preview(job, count=count, access=publish.access_of(job, environ)))


def ready(resolved: Resolved[Ready]) -> Ready:
    """Return what is to run, with its warnings in the log; ConfigError while a placeholder is left."""
    settled = resolved.ready()
    resolved.warn()
    return settled


def set_flags(words: list[str]) -> dict[str, Any]:
    """Return `KEY=VALUE` words as settings; a value is read as YAML, or kept as text where it is not."""
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip() or key.startswith("-"):
            raise ConfigError(f"--set {word}: expected KEY=VALUE, such as lora.r=8")
        try:
            settings[key.strip()] = yaml_documents(f"value: {text}", "--set")[0]["value"]
        except ConfigError:
            settings[key.strip()] = text
    return settings
