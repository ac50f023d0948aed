"""What goes into the image of a folder, and what the image says about it: one answer for `tune` and `push`.

The output folder of a job gives the adapter and what belongs to it, and nothing else; any other folder all
its files but those that are nobody's business or no part of a model. Does not know registries (runtime/oci
does). Start at `files` and `annotations`.
"""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from runtime import presets
from runtime.adapters import CONFIG_FILE, WEIGHTS_FILE
from runtime.errors import ConfigError
from runtime.logs import printable
from runtime.model_source import ModelSource
from runtime.oci import is_path
from runtime.oci.listing import list_files, named

log = logging.getLogger(__name__)

WORK = ".work"
"""Folder in a job's output folder with all that is the job's own: settings, which may hold signed addresses,
checkpoints, history, locks."""
REPORT = "tuning_report.json"
PAGE = "report.html"
"""The report as people open it."""

JOB_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    REPORT,
    PAGE,
)
"""Files of a job's output folder that its image holds; those that do not exist are left out."""

_TRAINING_STATE = re.compile(
    r"checkpoint-\d+|global_step\d+|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth|trainer_state\.json"
    r"|training_args\.bin|fine_tuning_completed\.txt|__pycache__"
)
"""Names of files and folders that only go on with a training: never part of what is pushed."""
_MOST_JSON_BYTES = 16 << 20
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def files(folder: Path, chosen: Sequence[str] | None = None) -> list[str]:
    """Return the relative paths of the files of `folder` that its image holds; what is left out is logged.

    chosen: paths that the user names instead. ConfigError when one is missing, leads out of the folder or
    belongs to the job that made the adapter, or when there is none.
    """
    if chosen:
        for name in chosen:
            if WORK in PurePosixPath(name).parts:
                raise ConfigError(
                    f"{name}: settings and checkpoints of a job, which may hold secrets; not pushed"
                )
        return list_files(folder, chosen)
    if (folder / WORK).is_dir():
        found = list_files(folder, [name for name in JOB_FILES if (folder / name).is_file()])
        left_out = {path.name for path in folder.iterdir()} - set(found)
    else:
        left_out = set()

        def skip(path: PurePosixPath) -> bool:
            skipped = path.name.startswith(".") or _TRAINING_STATE.fullmatch(path.name) is not None
            if skipped:
                left_out.add(str(path))
            return skipped

        found = list_files(folder, skip=skip)
    if left_out:
        log.info("%s: not in the image: %s", folder, named(sorted(left_out)))
    return found


def annotations(folder: Path) -> dict[str, str]:
    """Return what an image of `folder` says of itself: KAITO's model name, the base model, the data's digest.

    From the report of the job that made it, else from the adapter's configuration; {} without either. No time
    of creation: the same adapter pushed twice is the same image.
    """
    report, config = read_object(folder / REPORT), read_object(folder / CONFIG_FILE)
    model = as_object(report.get("model"))
    repository = model.get("repository") or config.get("base_model_name_or_path")
    if not isinstance(repository, str) or not _REPOSITORY.fullmatch(repository):
        repository = None  # a directory of some machine
    name = model.get("name")
    if not isinstance(name, str) or is_path(name):
        preset = presets.matching(ModelSource(name=repository)) if repository else None
        name = preset.name if preset else repository
    data = as_object(report.get("data")).get("files")
    digests = [as_object(file).get("sha256") for file in data] if isinstance(data, list) else []
    given = {
        "org.opencontainers.image.title": report.get("job"),
        "sh.kaito.model.name": name,
        "sh.kaito.model.repository": repository,
        "sh.kaito.model.revision": model.get("revision") or (config.get("revision") if repository else None),
        "sh.kaito.tuning.data.sha256": " ".join(digest for digest in digests if isinstance(digest, str)),
    }
    return {key: printable(value) for key, value in given.items() if isinstance(value, str) and value}


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object, {} where there is none: other readers of the file say what is wrong with it."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            return {}
        return as_object(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}


def as_object(value: object) -> dict[str, Any]:
    """Return a JSON object, {} for any other value."""
    return value if isinstance(value, dict) else {}
