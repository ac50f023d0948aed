"""`runtime manifest`: a Workspace as objects for `kubectl apply`, where no controller makes them.

Knows flags and YAML. What the objects are lies in runtime/workspace/kubernetes.py. Start at `manifest`.
"""

import logging
from pathlib import Path
from typing import Annotated

import typer
import yaml

log = logging.getLogger(__name__)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A Workspace manifest, for tuning or inference.")]
Image = Annotated[str, typer.Option(metavar="REF", help="This project's image, as the nodes pull it.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of each pod.")]
ImageVolumes = Annotated[
    bool,
    typer.Option(
        "--image-volumes",
        help="Mount adapter images as volumes (Kubernetes 1.35, or 1.33 with ImageVolume), do not pull.",
    ),
]


def manifest(file: File, image: Image, gpus: Gpus = 1, image_volumes: ImageVolumes = False) -> None:
    """Print a Workspace as a Job, or a Deployment and a Service, for clusters without the controller."""
    from runtime.workspace import kubernetes

    choices = kubernetes.PodOptions(image=image, gpus=gpus, image_volumes=image_volumes)
    found, sentences = kubernetes.objects(file, choices)
    for sentence in sentences:
        log.warning("%s", sentence)
    typer.echo(yaml.dump_all(found, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True), nl=False)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes texts of several lines as they are, and indents lists."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
