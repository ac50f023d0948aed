"""Names of models and images, checked when settings are resolved: a dry run refuses what the pod would.

Contacts no registry; what a name may be stands in oci/reference.py. Start at `check_job` and `check_server`.
"""

from collections.abc import Mapping

from runtime import oci, presets, support
from runtime.errors import ConfigError
from runtime.files import kind_of
from runtime.serving.settings import ServeConfig
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
    for adapter in config.adapters:
        if not oci.is_path(adapter.reference) and kind_of(adapter.reference) is None:
            _check(adapter.reference, f"{sources.get('adapters', 'adapters')} {adapter.name}", read=True)


def _check(image: str, source: str, *, read: bool) -> None:
    """Refuse a wrong name and, where the image is to be read, a layout that is not there."""
    if find_placeholders(image):
        return  # Resolved.ready refuses it; a dry run shows the rest
    try:
        layout = oci.parse(image).layout
    except ConfigError as error:
        hint = "; a shell variable in it has not been replaced" if "$" in image else ""
        raise ConfigError(f"{source}: {error}{hint}") from None
    if read and layout is not None and not layout.is_dir():
        raise ConfigError(f"{source}: no OCI layout in directory {layout}")
