"""`runtime push`, `runtime pull` and `runtime inspect`: folders to images and back.

Knows flags. The work lies in runtime/oci. Start at `add_to`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from runtime import oci
from runtime.cli import image_facts, render
from runtime.cli.options import AsJson, Debug, RequireSignature, path
from runtime.errors import ConfigError
from runtime.files import temporary_folder
from runtime.oci import Access, Reference

log = logging.getLogger(__name__)

Folder = Annotated[Path, typer.Argument(metavar="DIR", parser=path, help="The folder.")]
Image = Annotated[
    str, typer.Argument(metavar="REF", help="registry/repository:tag, or oci:DIRECTORY[:tag] for a layout.")
]
Auth = Annotated[
    Path | None,
    typer.Option(
        "--auth",
        metavar="PATH",
        parser=path,
        help="A Docker config.json, or a folder of them, tried before all others.",
    ),
]
Insecure = Annotated[bool, typer.Option(help="Allow plain HTTP and untrusted certificates.")]
Ca = Annotated[
    Path | None, typer.Option("--ca-file", metavar="FILE", parser=path, help="CA certificates to trust.")
]
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
Sign = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY", parser=path, help="Sign the image as cosign does, with this private"
                 " key (ECDSA P-256, PEM); its passphrase is read from COSIGN_PASSWORD."),
]  # fmt: skip
Stated = Annotated[
    bool,
    typer.Option("--provenance/--no-provenance", help="Attach a statement of where the files come from"
                 " (in-toto) and a bill of materials (CycloneDX)."),
]  # fmt: skip
CheckSignature = Annotated[
    list[str] | None,
    typer.Option("--require-signature", metavar="PUBKEY", help="A public key (PEM) to check signatures with;"
                 " an image without one by it is shown, and ends with exit status 5."),
]  # fmt: skip
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", parser=path, help="Keep downloaded blobs here, by digest."),
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
    sign: Sign = None,
    provenance: Stated = True,
    auth: Auth = None,
    insecure: Insecure = False,
    ca_file: Ca = None,
    debug: Debug = False,
) -> None:
    """Push a folder as an image with its files under /data, and print the digest.

    Of a job's output folder the adapter, tokenizer and report; of others all but hidden files and states of
    training.
    """
    target, source = oci.parse(reference), None if base is None else oci.parse(base)
    if source and modelpack:
        raise ConfigError("--base and --modelpack exclude each other: an artifact has no base image")
    access = _access(context, [target, source], auth, insecure, ca_file)
    key = oci.read_private(sign, access.key_password) if sign else None
    given = _Push(folder, target, source, access, key, provenance)
    digest = given.run(file, _annotations(annotation or []), modelpack=modelpack)
    typer.echo(digest)


@dataclass(frozen=True, slots=True)
class _Push:
    """What `push` was asked for."""

    folder: Path
    target: Reference
    base: Reference | None
    access: Access
    key: oci.SigningKey | None
    stated: bool

    def run(self, files: list[str] | None, notes: dict[str, str], *, modelpack: bool) -> str:
        from runtime import packing
        from runtime.oci import image
        from runtime.oci.images import load_base
        from runtime.oci.modelpack import build as build_modelpack
        from runtime.provenance import attaching

        target, base = self.target, self.base
        mount = base.repository if base and base.registry == target.registry else None
        chosen = packing.files(self.folder, files)
        notes = packing.annotations(self.folder) | notes
        attached = attaching(self.folder, chosen, target, key=self.key, stated=self.stated)
        with temporary_folder("push-") as scratch, attached as beside:

            def build() -> image.Image:
                if modelpack:
                    return build_modelpack(self.folder, files=chosen, annotations=notes)
                under = load_base(base, scratch, self.access) if base else None
                return image.build(self.folder, scratch, files=chosen, annotations=notes, base=under)

            return oci.push_image(build, target, access=self.access, mount_from=mount or None, beside=beside)


def pull(  # noqa: PLR0913, PLR0917
    context: typer.Context,
    reference: Image,
    folder: Folder,
    cache: Cache = None,
    require_signature: RequireSignature = None,
    auth: Auth = None,
    insecure: Insecure = False,
    ca_file: Ca = None,
    debug: Debug = False,
) -> None:
    """Pull an image's /data, or an artifact's files, into a new or empty folder."""
    source = oci.parse(reference)
    access = _access(context, [source], auth, insecure, ca_file, cache=cache)
    access = access.requiring(require_signature or ())
    typer.echo(str(oci.pull(source, folder, access=access)))


def inspect(  # noqa: PLR0913, PLR0917
    context: typer.Context,
    reference: Image,
    as_json: AsJson = False,
    require_signature: CheckSignature = None,
    auth: Auth = None,
    insecure: Insecure = False,
    ca_file: Ca = None,
    debug: Debug = False,
) -> None:
    """Show an image's digest, layers, annotations and signatures, and where it says it comes from."""
    from runtime.provenance import attached

    image = oci.parse(reference)
    access = _access(context, [image], auth, insecure, ca_file).requiring(require_signature or ())
    keys = oci.read_keys(access.required_keys)
    info = oci.inspect(image, access)
    beside = attached(image, info, keys, access=access)
    if as_json:
        typer.echo(json.dumps(image_facts.as_json(info, beside), indent=2))
    else:
        render.table(("fact", "value"), image_facts.rows(info, beside))
    if keys:
        oci.verify(image, info.digest, access.required_keys, index=info.named_digest, access=access)


def _access(  # noqa: PLR0913 - the flags that all three commands share
    context: typer.Context,
    references: Sequence[Reference | None],
    auth: Path | None,
    insecure: bool,
    ca_file: Path | None,
    *,
    cache: Path | None = None,
) -> Access:
    environ: Mapping[str, str] = context.obj or {}
    if auth is not None and not (auth.is_file() or auth.is_dir()):
        raise ConfigError(f"{auth}: no such file, expected a Docker config.json or a folder of them")
    if ca_file is not None and not (ca_file.is_file() or ca_file.is_dir()):
        raise ConfigError(f"{ca_file}: no such file, expected CA certificates in PEM form")
    flags = {"--auth": auth, "--insecure": insecure, "--ca-file": ca_file}
    given = [flag for flag, value in flags.items() if value]
    images = [reference for reference in references if reference is not None]
    if given and all(image.layout is not None for image in images):
        log.warning("%s without effect: %s is a directory, not a registry", ", ".join(given), images[0])
    files = [auth] if auth else []
    return oci.from_environment(environ, files=files, insecure=insecure, ca_file=ca_file, cache=cache)


def _annotations(words: list[str]) -> dict[str, str]:
    notes: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"--annotation {word!r}: expected KEY=VALUE")
        if key in notes:
            raise ConfigError(f"--annotation {word!r}: {key!r} is given twice; expected one value for it")
        notes[key] = value
    return notes
