"""Adapters on disk: find, check, combine and save them; an incomplete adapter folder is refused by name.

Plain files: `adapter_config.json` and `adapter_model.safetensors` (peft's format). Images are pulled by
runtime/oci. Needs torch only to combine and save. Start at `check`, `local_copy` and `save`.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PositiveInt
from safetensors import SafetensorError, safe_open

from runtime import oci
from runtime.config import parse
from runtime.errors import ConfigError
from runtime.files import atomic_files, write_atomic
from runtime.model_source import ModelSource

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_INSIDE = "base_model.model."
"""Prefix of the base model's module names in peft's files."""


class _LoraFields(BaseModel):
    """The fields of peft's LoraConfig that are read here and by the engine; the others are peft's own."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    r: PositiveInt
    rank_pattern: dict[str, PositiveInt] | None = None
    lora_alpha: float = 0.0
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """The facts that an adapter folder states."""

    folder: Path
    base: str | None
    """Model it was trained on: a repository id, or a directory of the machine it was trained on."""
    rank: int
    """Largest rank of any of its layers."""
    alpha: float
    targets: tuple[str, ...]


def find(root: Path) -> list[Path]:
    """Return the directories directly below `root` that look like adapters, sorted by name.

    A directory counts when it holds an adapter_config.json or adapter weights of any kind, so that a
    half-written one is found and can be refused by name.
    """
    if not root.is_dir():
        return []
    return sorted(
        folder
        for folder in root.iterdir()
        if folder.is_dir() and ((folder / CONFIG_FILE).exists() or any(folder.glob("adapter_model.*")))
    )


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
    with tempfile.TemporaryDirectory(prefix="adapter-") as scratch:
        image = oci.pull(oci.parse(reference), Path(scratch) / "image", access=access)
        yield _only_adapter(image, what, reference)


def no_directory(reference: str, what: str) -> ConfigError:
    """Return the error for an adapter that is no directory here and not written as an image."""
    hint = "" if oci.is_path(reference) else "; an image is written registry/repository:tag"
    return ConfigError(f"{what}: no directory {reference}{hint}")


def _only_adapter(image: Path, what: str, reference: str) -> Path:
    """Return the folder of an image with the adapter: the uppermost, and the only one there."""
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


def check(folder: Path, *, base: str | None = None, max_rank: int | None = None) -> Adapter:
    """Return what the adapter in `folder` is; ConfigError when it must not be loaded.

    Refused: half-written or unreadable files, pickled weights, a kind other than LoRA, whole trained
    layers (`modules_to_save`), a rank over `max_rank`, and another base model than `base` where both are
    public repository ids (a directory, as KAITO writes it, cannot be compared and passes).
    """
    name = folder.name
    document = _read_config(folder)
    if document.get("peft_type") != "LORA":
        raise ConfigError(f"adapter {name}: peft_type is {document.get('peft_type')!r}, expected 'LORA'")
    config = parse(_LoraFields, document, f"adapter {name}: {CONFIG_FILE}")
    if config.modules_to_save:
        raise ConfigError(f"adapter {name}: modules_to_save is {config.modules_to_save}, expected none")
    rank = max(config.r, *(config.rank_pattern or {}).values(), 1)
    if max_rank is not None and rank > max_rank:
        raise ConfigError(f"adapter {name}: rank is {rank}, the limit here is {max_rank}")
    trained_on = config.base_model_name_or_path or None
    if base is not None and _is_repository(base) and _is_repository(trained_on) and base != trained_on:
        raise ConfigError(f"adapter {name}: trained on {trained_on}, but {base} is served")
    _check_weights(folder)
    targets = config.target_modules or ()
    return Adapter(
        folder=folder,
        base=trained_on,
        rank=rank,
        alpha=config.lora_alpha if "lora_alpha" in config.model_fields_set else float(config.r),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
    )


def scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Return alpha / r of the layer at `path`, or alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732)."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if path == pattern or path.endswith(f".{pattern}"):
            alpha = value
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def combine(parts: Sequence[tuple[Path, float]], folder: Path) -> None:
    """Write to `folder` one adapter equal to the sum of all `parts`, given as (folder, strength).

    Exact: the factors of the updates are concatenated, so the rank is the sum of the ranks (KAITO's runtime
    takes an SVD at one adapter's rank instead). The parts have been checked. ConfigError for weights
    other than LoRA pairs of linear layers: DoRA's magnitudes, biases and embeddings cannot be summed so.
    """
    import torch
    from safetensors.torch import save_file

    pairs = _scaled_pairs(parts)
    rank = max(sum(down.shape[0] for down, _ in found) for found in pairs.values())
    joined = {}
    for path, found in pairs.items():
        down, up = torch.cat([down for down, _ in found]), torch.cat([up for _, up in found], dim=1)
        pad = rank - down.shape[0]  # one rank everywhere, and alpha equal to it: no scaling is left
        joined[f"{path}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, pad)).contiguous()
        joined[f"{path}.lora_B.weight"] = torch.nn.functional.pad(up, (0, pad)).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(joined, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    targets = sorted(path.removeprefix(_INSIDE) for path in pairs)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    write_atomic(folder / CONFIG_FILE, json.dumps(config))


def _scaled_pairs(
    parts: Sequence[tuple[Path, float]],
) -> "dict[str, list[tuple[torch.Tensor, torch.Tensor]]]":
    """Return by layer the LoRA pairs (A, B) of all `parts`, in float32, B times strength and scaling."""
    from safetensors.torch import load_file

    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for part, strength in parts:
        config, weights = _read_config(part), load_file(str(part / WEIGHTS_FILE))
        for key, down in weights.items():
            path, _, kind = key.rpartition(".lora_A.")
            if not path and ".lora_B." in key:
                continue
            up = weights.get(f"{path}.lora_B.{kind}")
            if up is None or down.dim() != 2:
                raise ConfigError(f"adapter {part.name}: {key} is no part of a LoRA pair of a linear layer")
            scale = strength * scaling(config, path.removeprefix(_INSIDE), down.shape[0])
            pairs.setdefault(path, []).append((down.float(), up.float() * scale))
    return pairs


def save(
    model: "PeftModel",
    folder: Path,
    *,
    source: ModelSource,
    first_weights: "Mapping[str, torch.Tensor] | None" = None,
    beside: Callable[[Path], object] | None = None,
) -> None:
    """Write `model`'s adapter files directly into `folder`, each atomically, the weights last.

    The config names the public repository and revision of the base, not a path of this machine.
    `first_weights`, initial weights that were subtracted from the base before training, are subtracted again.
    `beside(scratch)` may write further files (tokenizer, report) that appear together with them.
    """
    with atomic_files(folder, last=WEIGHTS_FILE) as scratch:
        # save_embedding_layers "auto" asks the hub, and may add layers that serving engines refuse
        model.save_pretrained(str(scratch), safe_serialization=True, save_embedding_layers=False)
        (scratch / "README.md").unlink(missing_ok=True)
        if first_weights is not None:
            _as_update(scratch, first_weights)
        _rewrite_config(scratch / CONFIG_FILE, source)
        if beside is not None:
            beside(scratch)


def _as_update(folder: Path, first_weights: "Mapping[str, torch.Tensor]") -> None:
    """Make the adapter in `folder` one for the base from which `first_weights` were not subtracted.

    B·A - B0·A0 is the product of [B, -B0] and [A; A0]: exact, at twice the rank.
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(str(folder / WEIGHTS_FILE))
    joined = {
        name: torch.cat((now, first_weights[name].to(now)))
        if ".lora_A." in name
        else torch.cat((now, -first_weights[name].to(now)), dim=1)
        for name, now in weights.items()
    }
    save_file(joined, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    config = _read_config(folder)
    scale = 2**0.5 if config.get("use_rslora") else 2
    config["r"] *= 2
    config["lora_alpha"] *= scale
    config["rank_pattern"] = {path: rank * 2 for path, rank in (config.get("rank_pattern") or {}).items()}
    config["alpha_pattern"] = {path: a * scale for path, a in (config.get("alpha_pattern") or {}).items()}
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")


def _rewrite_config(path: Path, source: ModelSource) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = source.repository or source.name
    config["revision"] = source.revision
    config["init_lora_weights"] = True  # the file has the values; peft would compute PiSSA's again
    for key, value in config.items():
        if key == "target_modules" and isinstance(value, list):
            config[key] = sorted(value)  # peft keeps a set: sorted, the same run writes the same bytes
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"adapter {folder.name}: no {CONFIG_FILE} in {folder}; is it half-written?"
        ) from None
    except RecursionError:
        raise ConfigError(f"adapter {folder.name}: {path} cannot be read as JSON: too deep") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"adapter {folder.name}: {path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"adapter {folder.name}: {path} holds no JSON object")
    return config


def _check_weights(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("adapter_model.*"))
        found = (
            f"only {', '.join(pickles)}, and pickled weights can run code"
            if pickles
            else "is it half-written?"
        )
        raise ConfigError(f"adapter {folder.name}: no {WEIGHTS_FILE} in {folder}; {found}")
    try:
        with safe_open(str(path), framework="np") as weights:
            names = list(weights.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"adapter {folder.name}: {path} is damaged or half-written: {error}") from None
    if not any("lora_A" in name for name in names):
        raise ConfigError(f"adapter {folder.name}: {path} holds no LoRA weights")


def _is_repository(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not name.startswith(("/", "."))
