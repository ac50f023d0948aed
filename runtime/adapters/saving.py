"""Saves a trained adapter as files that plain peft and serving engines load.

Does not know training. Start at `save`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, read_config
from runtime.files import atomic_files
from runtime.model_source import ModelSource

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


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
    config = read_config(folder, folder.name)
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
