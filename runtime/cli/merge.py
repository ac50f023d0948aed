"""`runtime merge`: an adapter and its base model as one model directory.

Knows flags. The work lies in runtime/merge.py. Start at `merge`.
"""

from pathlib import Path
from typing import Annotated

import typer

from runtime import adapters, hardware, oci
from runtime.cli.options import Debug, path
from runtime.model_source import Dtype

Adapter = Annotated[
    str,
    typer.Argument(metavar="ADAPTER", help="A directory, oci:DIRECTORY[:tag], or registry/repository:tag."),
]
Target = Annotated[Path, typer.Argument(metavar="DIR", parser=path, help="The new model directory.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The base model: a preset, repository id or directory; the one named by the adapter by default.",
    ),
]
WeightsDtype = Annotated[
    Dtype, typer.Option("--dtype", help="Type of the written weights; auto keeps that of the base model.")
]


def merge(  # noqa: PLR0913, PLR0917 - a command line has as many parameters as flags
    context: typer.Context,
    adapter: Adapter,
    target: Target,
    model: Model = None,
    dtype: WeightsDtype = "auto",
    debug: Debug = False,
) -> None:
    """Merge an adapter into its 16-bit base model, into a plain model that transformers loads."""
    from runtime import merge as merging

    with adapters.local_copy(adapter, access=oci.from_environment(context.obj or {})) as folder:
        base = merging.base_of(folder, model)
        typer.echo(merging.merge(folder, target, base=base, machine=hardware.host(), dtype=dtype))
