"""`runtime manifest`: Workspaces as objects for `kubectl apply`, for clusters without the controller.

Knows flags. The objects are made by runtime/workspace/kubernetes. Start at `manifest`.
"""

import logging
from pathlib import Path
from typing import Annotated

import typer

from runtime import gpus as known_gpus
from runtime.cli.options import QUANTIZE, Debug, Quantize
from runtime.errors import ConfigError

log = logging.getLogger(__name__)

API_KEY = "api-key"
"""Key of the Secret that `--api-key-secret NAME` names."""
API_KEYS = "api-keys"
"""Key of the Secret that `--api-key-file-secret NAME` names."""

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A manifest with Workspaces, for tuning or inference.")
]
Image = Annotated[
    str, typer.Option(metavar="REF", help="This project's image, under the name by which the nodes pull it.")
]
Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="GPU|TYPE|SIZE",
        help=f"A node's GPUs, where its instanceType does not tell: {known_gpus.EXAMPLES}; also '2x NAME'.",
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option(min=0, help="GPUs to use of each node; all by default, 0 for nodes without any."),
]
ImageVolumes = Annotated[
    bool,
    typer.Option(
        "--image-volumes",
        help="Mount adapter images as volumes, not pull them (Kubernetes 1.35, or 1.33 with ImageVolume).",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="A training_config.yaml or inference_config.yaml, or a ConfigMap that holds one."),
]
Cpu = Annotated[str | None, typer.Option(metavar="QUANTITY", help="Processors to request, such as 4.")]
Memory = Annotated[str | None, typer.Option(metavar="QUANTITY", help="Memory to request, such as 16Gi.")]
CacheClaim = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="PersistentVolumeClaim that keeps downloaded weights, for all pods."),
]
ApiKeySecret = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:KEY]",
        help=f"Secret with the API key that clients must send, under '{API_KEY}' or KEY.",
    ),
]

ApiKeyFileSecret = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:KEY]",
        help=f"Secret with a file of several API keys (docs/keys.md), under '{API_KEYS}' or KEY.",
    ),
]


def manifest(  # noqa: PLR0913, PLR0917 - a command line has as many parameters as flags
    file: File,
    image: Image,
    config: Config = None,
    gpu: Gpu = None,
    gpus: Gpus = None,
    quantize: Quantize = None,
    image_volumes: ImageVolumes = False,
    cpu: Cpu = None,
    memory: Memory = None,
    cache_claim: CacheClaim = None,
    api_key_secret: ApiKeySecret = None,
    api_key_file_secret: ApiKeyFileSecret = None,
    debug: Debug = False,
) -> None:
    """Print Workspaces as Jobs, or Deployments and Services, for clusters without the controller."""
    from runtime.workspace import kubernetes
    from runtime.workspace.kubernetes import text

    named = known_gpus.named(gpu) if gpu else None
    options = kubernetes.PodOptions(
        image=image,
        machine=named.hardware if named else None,
        gpus=gpus,
        image_volumes=image_volumes,
        config=config,
        flags=("--quantize", quantize) if quantize else (),
        settings=QUANTIZE.get(quantize, {}),
        cpu=cpu,
        memory=memory,
        cache_claim=cache_claim,
        api_key=_secret(api_key_secret, "--api-key-secret", API_KEY),
        api_key_file=_secret(api_key_file_secret, "--api-key-file-secret", API_KEYS),
    )
    objects, warnings = kubernetes.objects(file, options)
    for warning in (*([named.assumed] if named and named.assumed else []), *warnings):
        log.warning("%s", warning)
    typer.echo(text.dump(objects), nl=False)


def _secret(written: str | None, flag: str, usual: str) -> tuple[str, str] | None:
    """Return the name and the key of `NAME` or `NAME:KEY`; None where nothing is written."""
    if written is None:
        return None
    name, colon, key = written.partition(":")
    if not name or (colon and not key) or ":" in key:
        raise ConfigError(f"{flag} {written}: expected NAME, or NAME:KEY")
    return name, key or usual
