"""An adapter's folder: found, checked, pulled where it is an image; what must not load is refused by name.

Reads headers of files, never weights, and needs no torch. Start at `check`, `check_served` and `local_copy`.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from runtime import oci
from runtime.adapters import lora_config
from runtime.adapters.lora_config import PREFIX, LoraFields
from runtime.adapters.own_template import MOST_BYTES, TEMPLATE_FOLDER
from runtime.config import parse
from runtime.errors import ConfigError, one_line
from runtime.files import temporary_folder

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MAX_CONFIG_BYTES = 4 << 20
"""An adapter_config.json is a few KiB."""
MAX_WEIGHTS_BYTES = 16 << 30
"""Of one adapter: rank 256 on every layer of a model of 70 billion parameters has 14 GiB in float32."""
MAX_HEADER_BYTES = 32 << 20
"""Of its weights: the names and shapes of 200,000 matrices."""

MESSAGE_SHOWN = 600
"""Characters of a message: names of keys and tensors are an adapter's own, of any length and in any lines."""
KEY_SHOWN, SHOWN = 60, 8
"""Characters of a key that a message repeats, and how many keys it names."""

_PAIR = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter folder states."""

    name: str
    """What messages call it."""
    folder: Path
    config: dict[str, Any]
    """peft's LoraConfig as it is written."""
    fields: LoraFields
    """What of it is read here."""
    shapes: dict[str, tuple[int, ...]]
    """Of the tensors by their names, without "base_model.model."."""

    @property
    def base(self) -> str | None:
        """Model it was trained on: a repository id, or a directory of the machine it was trained on."""
        return self.fields.base_model_name_or_path or None

    @property
    def paths(self) -> list[str]:
        """The modules with a lora_A, as the base model calls them."""
        return [name.removesuffix(_PAIR[0]) for name in self.shapes if name.endswith(_PAIR[0])]

    @property
    def rank(self) -> int:
        """Largest rank of any of them."""
        return max((self.shapes[path + _PAIR[0]][0] for path in self.paths), default=0)


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Cut what a ConfigError of an adapter says to one line."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(one_line(error, MESSAGE_SHOWN)) from None


def find(root: Path) -> list[Path]:
    """Return the directories directly below `root` that look like adapters, sorted by name.

    A directory counts when it holds an adapter_config.json or adapter weights of any kind, so that a
    half-written one is found and can be refused by name. Links out of `root` are left out, and logged.
    """
    if not root.is_dir():
        return []
    found = []
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or not (
            (folder / CONFIG_FILE).exists() or any(folder.glob("adapter_model.*"))
        ):
            continue
        if folder.resolve().is_relative_to(root.resolve()):
            found.append(folder)
        else:
            log.warning("Adapter refused: %s: %s is a link out of %s", folder.name, folder, root)
    return found


@contextlib.contextmanager
def local_copy(reference: str, *, access: oci.Access, name: str | None = None) -> Iterator[Path]:
    """Yield the folder with an adapter's two files: a directory, or an image, pulled while the block runs.

    Raises ConfigError, which calls the adapter `name`, when `reference` is neither; RegistryError or
    TransientError when the image cannot be pulled.
    """
    what = f"adapter {name or reference}"
    folder = Path(reference)
    if folder.is_dir():
        yield folder
        return
    if not oci.is_image(reference):
        raise no_directory(reference, what)
    with temporary_folder("adapter-") as scratch:
        image = oci.pull(oci.parse(reference), scratch / "image", access=access)
        yield within(image, what, reference)


def no_directory(reference: str, what: str) -> ConfigError:
    """Return the error for an adapter that is no directory here and not written as an image."""
    hint = "" if oci.is_path(reference) else "; an image is written registry/repository:tag"
    return ConfigError(f"{what}: no directory {reference}{hint}")


def within(image: Path, what: str, reference: str) -> Path:
    """Return the folder of an image with the adapter: the uppermost, and the only one there.

    Raises ConfigError, which calls the adapter `what` and the image `reference`.
    """
    found = sorted(path.parent.relative_to(image) for path in image.rglob(CONFIG_FILE))
    if not found:
        raise ConfigError(f"{what}: {reference} holds no {CONFIG_FILE}")
    depth = min(len(folder.parts) for folder in found)
    uppermost = [str(folder) for folder in found if len(folder.parts) == depth]
    if len(uppermost) > 1:
        raise ConfigError(
            f"{what}: {reference} holds {len(uppermost)} adapters ({', '.join(uppermost[:8])}), expected one;"
            " push each as an image of its own"
        )
    return image / uppermost[0]


@in_one_line()
def check(folder: Path, *, name: str | None = None, base: str | None = None) -> Adapter:
    """Return what the adapter in `folder` is; ConfigError, which calls it `name`, when it must not be read.

    Refused: half-written or unreadable files, pickled weights, a kind other than LoRA for text generation,
    and another base model than `base` where both are public repository ids (a directory, as KAITO writes it,
    cannot be compared and passes).
    """
    name = name or folder.name
    _check_links(folder, name)
    config = read_config(folder, name)
    for key, right in (("peft_type", ("LORA",)), ("task_type", ("CAUSAL_LM", None))):
        if config.get(key) not in right:
            raise ConfigError(f"adapter {name}: {key} is {config.get(key)!r}, expected {right[0]!r}")
    fields = parse(LoraFields, config, f"adapter {name}: {CONFIG_FILE}")
    adapter = Adapter(name, folder, config, fields, _shapes(folder, name))
    if base is not None and _is_repository(base) and _is_repository(adapter.base) and base != adapter.base:
        raise ConfigError(f"adapter {name}: trained on {adapter.base}, but {base} is served")
    if not any(".lora_A" in tensor or ".lora_embedding_A" in tensor for tensor in adapter.shapes):
        raise ConfigError(f"adapter {name}: {folder / WEIGHTS_FILE} holds no LoRA weights")
    return adapter


@in_one_line()
def check_served(
    folder: Path, *, name: str | None = None, base: str | None = None, most_rank: int | None = None
) -> Adapter:
    """Return what the adapter in `folder` is; ConfigError when serving would not do what it was trained for.

    Refused beside what `check` refuses: keys of lora_config.NOT_SERVED, keys that nobody here knows unless
    they ask for nothing (those are logged), tensors that are no LoRA pair of a linear layer, weights of
    modules that target_modules leaves out, which peft would not load, and a larger rank than `most_rank`.
    """
    adapter = check(folder, name=name, base=base)
    name, reasons = adapter.name, lora_config.not_served(adapter.config)
    if reasons:
        hint = "" if lora_config.not_merged(adapter.config) else "; runtime merge can add it to its base"
        raise ConfigError(f"adapter {name}: cannot be served as an adapter: {'; '.join(reasons)}{hint}")
    _check_unknown(adapter)
    _check_pairs(adapter)
    _check_described(adapter)
    if most_rank is not None and adapter.rank > most_rank:
        raise ConfigError(
            f"adapter {name}: has rank {adapter.rank}, and max_lora_rank is {most_rank}: raise that, or take "
            "an adapter of a smaller rank"
        )
    return adapter


def _check_unknown(adapter: Adapter) -> None:
    """Raise ConfigError for a key that is not known here and asks for something; name those that do not.

    A newer peft that adds a way to compute adds a key for it, and "off" is what is false.
    """
    unknown = [key for key in adapter.config if key not in lora_config.KNOWN]
    asking = [one_line(key, KEY_SHOWN) for key in unknown if adapter.config[key]]
    if asking:
        raise ConfigError(
            f"adapter {adapter.name}: {CONFIG_FILE} has keys that are not known here and may change what it "
            f"computes: {', '.join(asking[:SHOWN])}; take out those that only say how it was trained"
        )
    if unknown:
        names = ", ".join(one_line(key, KEY_SHOWN) for key in unknown[:SHOWN])
        log.info("adapter %s: keys that are not known here and ask for nothing: %s", adapter.name, names)


def _check_pairs(adapter: Adapter) -> None:
    """Raise ConfigError for tensors that are no LoRA pair of a linear layer."""
    name = adapter.name
    for tensor, shape in adapter.shapes.items():
        kind = next((kind for kind in _PAIR if tensor.endswith(kind)), None)
        path = tensor.removesuffix(kind or "")
        if kind is None or any(path + each not in adapter.shapes for each in _PAIR):
            raise ConfigError(
                f"adapter {name}: holds {tensor}, expected pairs of lora_A and lora_B of linear layers only"
            )
        if len(shape) != 2 or 0 in shape:
            raise ConfigError(f"adapter {name}: {tensor} has the shape {list(shape)}, expected a matrix")
    for path in adapter.paths:
        down, up = (adapter.shapes[path + kind] for kind in _PAIR)
        if down[0] != up[1]:
            raise ConfigError(f"adapter {name}: {path} has lora_A of rank {down[0]} and lora_B of {up[1]}")


def _check_described(adapter: Adapter) -> None:
    """Raise ConfigError for weights of other modules or ranks than the configuration states."""
    name, paths = adapter.name, adapter.paths
    try:
        left_out = sorted(set(paths) - lora_config.targeted(adapter.fields, paths))
        ranks = lora_config.ranks(adapter.fields, paths)
    except ConfigError as error:
        raise ConfigError(f"adapter {name}: {error}") from None
    if left_out:
        raise ConfigError(
            f"adapter {name}: holds weights of {left_out[0]}, which its {CONFIG_FILE} leaves out "
            "(target_modules, exclude_modules, layers_to_transform)"
        )
    for path, rank in ranks.items():
        if (found := adapter.shapes[path + _PAIR[0]][0]) != rank:
            raise ConfigError(
                f"adapter {name}: {path} has rank {found}, its {CONFIG_FILE} says {rank} (r, rank_pattern)"
            )


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the adapter_config.json in `folder`; ConfigError when the adapter called `name` has none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"adapter {name}: no {CONFIG_FILE} in {folder}; is it half-written?")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"adapter {name}: {path} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ConfigError(f"adapter {name}: {path} cannot be read as JSON: too deep") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"adapter {name}: {path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"adapter {name}: {path} holds no JSON object")
    return config


def _check_links(folder: Path, name: str) -> None:
    """Raise ConfigError for a file that is read and is none, or a link out of the adapter's folder.

    A link may lead elsewhere in it, as in volumes of Kubernetes, or to the `blobs` beside the snapshots of
    the hub's cache; others would have a server read any file of its machine.
    """
    root = folder.resolve()
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    files = [folder / file for file in (CONFIG_FILE, WEIGHTS_FILE, *MOST_BYTES)]
    for path in (*files, *(folder / TEMPLATE_FOLDER).glob("*.jinja")):
        target = path.resolve()
        if not any(target.is_relative_to(allowed) for allowed in (root, blobs)):
            raise ConfigError(f"adapter {name}: {path} is a link out of the adapter's folder")
        if (path.is_symlink() and not target.is_file()) or (path.exists() and not path.is_file()):
            raise ConfigError(f"adapter {name}: {path} is no file")


def _shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapter's tensors; ConfigError without whole weights."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("adapter_model.*"))
        found = (
            f"only {', '.join(pickles)}, and pickled weights can run code"
            if pickles
            else "is it half-written?"
        )
        raise ConfigError(f"adapter {name}: no {WEIGHTS_FILE} in {folder}; {found}")
    _check_size(path, name)
    try:
        with safe_open(str(path), framework="np") as weights:
            names = list(weights.keys())
            return {key.removeprefix(PREFIX): tuple(weights.get_slice(key).get_shape()) for key in names}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"adapter {name}: {path} is damaged or half-written: {error}") from None


def _check_size(path: Path, name: str) -> None:
    """Raise ConfigError for weights, or a header of theirs, beyond what any adapter has; reads 8 bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise ConfigError(f"adapter {name}: {path} cannot be read: {error.strerror}") from None
    for what, found, most in (("", size, MAX_WEIGHTS_BYTES), ("a header of ", header, MAX_HEADER_BYTES)):
        if most < found <= size:  # a header longer than its file is damaged, which its reader says
            raise ConfigError(
                f"adapter {name}: {path} has {what}{found:,} bytes; an adapter has {most:,} at most"
            )


def _is_repository(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not name.startswith(("/", "."))
