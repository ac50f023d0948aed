"""`runtime push`, `runtime pull` and `runtime inspect`: folders to images and back.

Knows flags. The work lies in runtime/oci. Start at `add_to`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from runtime import oci
from runtime.cli import render
from runtime.cli.options import AsJson
from runtime.errors import ConfigError
from runtime.oci import Access

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder.")]
Image = Annotated[
    str, typer.Argument(metavar="REF", help="registry/repository:tag, or oci:DIRECTORY[:tag] for a layout.")
]
Auth = Annotated[
    Path | None,
    typer.Option(
        "--auth", metavar="PATH", help="A Docker config.json, or a folder of them, tried before all others."
    ),
]
Insecure = Annotated[bool, typer.Option(help="Allow plain HTTP and untrusted certificates.")]
Ca = Annotated[Path | None, typer.Option("--ca-file", metavar="FILE", help="CA certificates to trust.")]
Files = Annotated[
    list[str] | None, typer.Option("--file", metavar="PATH", help="Push only this file of the folder.")
]
Notes = Annotated[
    list[str] | None, typer.Option("--annotation", metavar="KEY=VALUE", help="Annotate the image.")
]
BaseImage = Annotated[
    str | None,
    typer.Option("--base", metavar="REF", help="Base image for the files, such as busybox, for controllers"
                 " that run commands in it."),
]  # fmt: skip
AsModelPack = Annotated[
    bool, typer.Option("--modelpack", help="Make a CNCF ModelPack artifact instead of an image.")
]
Cache = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="Keep downloaded blobs here, by digest.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the console script."""
    app.command("push")(push)
    app.command("pull")(pull)
    app.command("inspect")(inspect)


def push(  # noqa: PLR0913, PLR0917 - a command line has as many parameters as flags
    context: typer.Context,
    folder: Folder,
    reference: Image,
    file: Files = None,
    annotation: Notes = None,
    base: BaseImage = None,
    modelpack: AsModelPack = False,
    auth: Auth = None,
    insecure: Insecure = False,
    ca_file: Ca = None,
) -> None:
    """Push a folder as an image with its files under /data, and print the digest.

    Of a job's output folder the adapter, tokenizer and report; of others all but hidden files and states of
    training.
    """
    from runtime import packing
    from runtime.oci import image
    from runtime.oci.images import load_base, scratch_folder
    from runtime.oci.modelpack import build as build_modelpack

    target, access = oci.parse(reference), _access(context, auth, insecure, ca_file)
    if base and modelpack:
        raise ConfigError("--base and --modelpack exclude each other: an artifact has no base image")
    source = oci.parse(base) if base else None
    mount = source.repository if source and source.registry == target.registry else None
    chosen = packing.files(folder, file)
    notes = packing.annotations(folder) | _annotations(annotation or [])
    with scratch_folder() as scratch:

        def build() -> image.Image:
            if modelpack:
                return build_modelpack(folder, files=chosen, annotations=notes)
            under = load_base(source, scratch, access) if source else None
            return image.build(folder, scratch, files=chosen, annotations=notes, base=under)

        digest = oci.push_image(build, target, access=access, mount_from=mount or None)
    typer.echo(digest)


def pull(  # noqa: PLR0913, PLR0917
    context: typer.Context,
    reference: Image,
    folder: Folder,
    cache: Cache = None,
    auth: Auth = None,
    insecure: Insecure = False,
    ca_file: Ca = None,
) -> None:
    """Pull an image's /data, or an artifact's files, into a new or empty folder."""
    access = _access(context, auth, insecure, ca_file, cache=cache)
    typer.echo(str(oci.pull(oci.parse(reference), folder, access=access)))


def inspect(  # noqa: PLR0913, PLR0917
    context: typer.Context,
    reference: Image,
    as_json: AsJson = False,
    auth: Auth = None,
    insecure: Insecure = False,
    ca_file: Ca = None,
) -> None:
    """Show digest, kind, layers and annotations of an image."""
    info = oci.inspect(oci.parse(reference), _access(context, auth, insecure, ca_file))
    manifest = info.manifest
    if as_json:
        layers = [layer.as_json() for layer in manifest.layers]
        facts = {"reference": str(info.reference), "digest": info.digest, "kind": manifest.kind}
        typer.echo(json.dumps({**facts, "layers": layers, "annotations": manifest.annotations}, indent=2))
        return
    rows = [("digest", info.digest), ("kind", manifest.kind), ("bytes", str(manifest.size))]
    rows += [(f"layer {number}", f"{layer.media_type} {layer.digest} {layer.size}") for number, layer in
             enumerate(manifest.layers, 1)]  # fmt: skip
    rows += sorted(manifest.annotations.items())
    render.table(("fact", "value"), rows)


def _access(
    context: typer.Context,
    auth: Path | None,
    insecure: bool,
    ca_file: Path | None,
    *,
    cache: Path | None = None,
) -> Access:
    environ: Mapping[str, str] = context.obj or {}
    if auth is not None and not auth.exists():
        raise ConfigError(f"{auth}: no such file, expected a Docker config.json or a folder of them")
    files = [auth] if auth else []
    return oci.from_environment(environ, files=files, insecure=insecure, ca_file=ca_file, cache=cache)


def _annotations(words: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in words]
    for key, equals, _ in pairs:
        if not equals or not key:
            raise ConfigError(f"--annotation {key!r}: expected KEY=VALUE")
    return {key: value for key, _, value in pairs}
