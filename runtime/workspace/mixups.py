"""Data where a model belongs on the command line of `runtime tune`, and a model where data belongs.

Knows how either looks, on disk or by its name, and answers with the command that was meant. Start at `check`.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from runtime import oci, presets
from runtime.errors import ConfigError, DataError
from runtime.files import kind_of
from runtime.tuning.data import formats
from runtime.tuning.data.folder import data_files

HEAD_BYTES = 64 << 10
"""Of a JSON file, read to tell rows from a manifest."""


def check(target: str | None, data: Sequence[str]) -> None:
    """Raise ConfigError where `target`, the model or manifest, is data, or a word of `--data` is a model."""
    if target is not None and is_data(target):
        model = next((word for word in data if _is_model(word)), None)
        command = f"runtime tune {shlex.quote(model or 'MODEL')} --data {shlex.quote(target)}"
        raise ConfigError(
            f"{target} is data, and the model or the manifest comes first: {command}"
            + (
                ""
                if model
                else "; MODEL is a preset (`runtime presets` lists them), a repository id or a directory"
            )
        )
    for word in data:
        _refuse_model(word, named=target is not None)


def _refuse_model(word: str, *, named: bool) -> None:
    """Raise ConfigError where `word` of `--data` is a model, or may be something of the hub."""
    quoted = shlex.quote(word)
    first = f"a model comes first: runtime tune {quoted} --data FILE"
    if _is_model(word) and (kind_of(word) or presets.is_known(word)):
        raise ConfigError(f"--data: {word} is a model, not data; {first}")
    if kind_of(word) is None and _may_be_on_hub(word):
        local = shlex.quote(word.partition("/")[2])
        fetch = f"hf download --repo-type dataset {quoted} --local-dir {local}"
        raise ConfigError(
            f"--data: {word}: no such file or directory; a data set of the hub is downloaded first: {fetch}"
            + ("" if named else f"; {first}")
        )


def _may_be_on_hub(word: str) -> bool:
    path_like = word.startswith((".", "~", "/")) or formats.file_format(Path(word)) is not None
    return word.count("/") == 1 and not path_like and not oci.is_image(word)


def is_data(target: str) -> bool:
    """Return whether `target` is a data file, a folder of them or the address of one."""
    if target.startswith(("http://", "https://")):
        return True
    path, kind = Path(target).expanduser(), kind_of(target)
    if kind == "folder":
        return not (path / "config.json").is_file() and _holds_data(path)
    form = formats.file_format(path)
    if form == "json":
        return kind == "file" and not _may_be_manifest(path)
    return form is not None


def _holds_data(folder: Path) -> bool:
    try:
        return bool(data_files(folder))
    except DataError:  # of an incomplete copy
        return True


def _may_be_manifest(path: Path) -> bool:
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and b'"kind"' in head


def _is_model(word: str) -> bool:
    if kind_of(word) == "folder":
        return (Path(word).expanduser() / "config.json").is_file()
    try:
        presets.source(word)
    except ConfigError:
        return False
    return kind_of(word) is None and not word.startswith(("http://", "https://"))
