"""Models' directories, names of images and addresses of data, checked as settings are resolved.

A dry run checks them too. Contacts nobody; what a name may be stands in oci/reference.py and
tuning/data/urls.py, what a model's files may hold in model_files.py. Start at `check_job` and `check_server`.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from runtime import adapters, models, oci, presets, support
from runtime.errors import ConfigError
from runtime.files import kind_of
from runtime.model_source import ModelSource
from runtime.serving.settings import ServeConfig
from runtime.tuning.data import urls
from runtime.tuning.settings import TuningJob
from runtime.workspace.layers import find_placeholders


def check_job(job: TuningJob, sources: Mapping[str, str]) -> None:
    """Raise ConfigError, naming its source, for an image of the job that no registry can have."""
    images = {
        "output.image": job.output.image,
        "output.checkpoint_image": job.output.checkpoint_image,
        "data.image": job.data.image,
        "model.image": job.model.image,
    }
    for setting, image in images.items():
        if image is not None:
            _check(image, sources.get(setting, setting), read=not setting.startswith("output"))
    for url in job.data.urls:
        _check_url(url, sources.get("data.urls", "data.urls"))
    paths = {"output.credentials": job.output.credentials, "data.file": job.data.file}
    _check_paths(paths | {"model.path": job.model.path}, sources)
    _check_model(job.model)


def notes(job: TuningJob, sources: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for a revision of the base model that is no commit, so that it may change."""
    revision = job.model.revision
    if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        source = sources.get("model.revision", "model.revision")
        yield (
            f"{source} is '{revision}', no commit (40 hex digits): a branch or tag is looked up when the job "
            "runs, and may be another commit by then"
        )


def check_server(config: ServeConfig, sources: Mapping[str, str]) -> None:
    """Raise ConfigError, naming its source, for what the pod would refuse.

    A preset that only vLLM can serve, an image name that no registry can have, an adapter's directory or
    layout that is not there.
    """
    preset = presets.matching(config.model)
    if preset is not None and config.engine == "own":
        served, why = support.serving_of(preset)
        if served == "vLLM only":
            raise ConfigError(f"model {config.model.name}: {why}; --engine vllm may serve it")
    if config.model.image is not None:
        _check(config.model.image, sources.get("model.image", "model.image"), read=True)
    _check_paths({"model.path": config.model.path}, sources)
    _check_model(config.model)
    for adapter_source in config.adapter_sources:
        _check_source(adapter_source, sources.get("adapter_sources", "adapter_sources"))
    for adapter in config.adapters:
        if not oci.is_path(adapter.reference) and kind_of(adapter.reference) is None:
            _check(adapter.reference, f"{sources.get('adapters', 'adapters')} {adapter.name}", read=True)


def check_adapter(reference: str, where: str) -> None:
    """Refuse what is neither a directory with an adapter nor written as an image.

    A path that is mistyped must not become a question to a public registry: an image has a scheme, a
    registry's host or, with a folder before it, a tag.
    """
    folder = Path(reference)
    if folder.is_dir():
        if not any(folder.glob("adapter_[cm]o*")):  # half of one is refused by name, when it is loaded
            raise ConfigError(f"{where}: directory {reference} holds no adapter (adapter_config.json)")
    elif kind_of(reference) is not None:
        raise ConfigError(f"{where}: {reference} is a file, expected the directory of an adapter")
    elif not oci.is_image(reference) and not find_placeholders(reference):
        raise adapters.no_directory(reference, where)


def check_adapters(config: ServeConfig) -> None:
    """Refuse, before a model is loaded, adapters in directories that are not there."""
    for adapter in config.adapters:
        if oci.is_path(adapter.reference):
            check_adapter(adapter.reference, f"adapter {adapter.name}")


def _check_paths(paths: Mapping[str, Path | None], sources: Mapping[str, str]) -> None:
    """Refuse files and directories that a flag names and that are not there."""
    for setting, path in paths.items():
        source = sources.get(setting, "")
        if path is not None and source.startswith("flag") and not path.exists():
            raise ConfigError(f"{source}: no such file or directory: {path}")


def _check_model(source: ModelSource) -> None:
    """Refuse a model's directory with odd JSON files, as the run does; a preview needs no weights."""
    if source.path is not None and source.path.is_dir():
        models.locate(source, weights=False)


def _check_url(url: str, source: str) -> None:
    """Refuse an address that nothing is ever fetched from, and a digest that is none."""
    if find_placeholders(url):
        return
    try:
        urls.parse(url)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_source(text: str, source: str) -> None:
    """Refuse what is no folder of a registry."""
    if find_placeholders(text):
        return
    try:
        oci.parse_repository(text)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check(image: str, source: str, *, read: bool) -> None:
    """Refuse a wrong name and, where the image is to be read, a layout that is not there."""
    if find_placeholders(image):
        return  # Resolved.ready refuses it; a dry run shows the rest
    try:
        reference = oci.parse(image)
    except ConfigError as error:
        hint = "; a shell variable in it has not been replaced" if "$" in image else ""
        raise ConfigError(f"{source}: {error}{hint}") from None
    if not read and reference.digest is not None:
        raise ConfigError(
            f"{source}: {image} names an image that is there already; name the new one by a tag"
        )
    if read and reference.layout is not None and not reference.layout.is_dir():
        raise ConfigError(f"{source}: no OCI layout in directory {reference.layout}")
