"""`runtime manifest`: a Workspace as objects for `kubectl apply`, for clusters without the controller.

Knows flags and YAML. The objects are made by runtime/workspace/kubernetes.py. Start at `manifest`.
"""

import logging
from pathlib import Path
from typing import Annotated

import typer
import yaml

from runtime.workspace import kubernetes

log = logging.getLogger(__name__)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A Workspace manifest, for tuning or inference.")]
Image = Annotated[
    str, typer.Option(metavar="REF", help="This project's image, under the name by which the nodes pull it.")
]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of each pod.")]
ImageVolumes = Annotated[
    bool,
    typer.Option(
        "--image-volumes",
        help="Mount adapter images as volumes, not pull them (Kubernetes 1.35, or 1.33 with ImageVolume).",
    ),
]


def manifest(file: File, image: Image, gpus: Gpus = 1, image_volumes: ImageVolumes = False) -> None:
    """Print a Workspace as a Job, or a Deployment and a Service, for clusters without the controller."""
    options = kubernetes.PodOptions(image=image, gpus=gpus, image_volumes=image_volumes)
    objects, warnings = kubernetes.objects(file, options)
    for warning in warnings:
        log.warning("%s", warning)
    typer.echo(
        yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True), nl=False
    )


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes multi-line texts as block scalars, and indents lists."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
