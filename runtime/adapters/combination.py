"""One adapter that does what several do together. Needs torch. Start at `combine`."""

import json
from collections.abc import Sequence
from pathlib import Path

from runtime.adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from runtime.adapters.lora_config import PREFIX
from runtime.files import write_atomic


def combine(parts: Sequence[tuple[Path, float]], folder: Path) -> None:
    """Write to `folder` one adapter equal to the sum of all `parts`, given as (folder, strength).

    Exact: the factors of the updates are concatenated, so the rank is the sum of the ranks (KAITO's runtime
    takes an SVD at one adapter's rank instead). ConfigError for a part that cannot be served.
    """
    import torch
    from safetensors.torch import save_file

    from runtime.adapters.weights import scaled_pairs

    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for part, strength in parts:
        for path, pair in scaled_pairs(part, strength=strength).items():
            pairs.setdefault(path, []).append(pair)
    rank = max(sum(down.shape[0] for down, _ in found) for found in pairs.values())
    joined = {}
    for path, found in pairs.items():
        down, up = torch.cat([down for down, _ in found]), torch.cat([up for _, up in found], dim=1)
        pad = rank - down.shape[0]  # one rank everywhere, and alpha equal to it: no scaling is left
        joined[f"{PREFIX}{path}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, pad)).contiguous()
        joined[f"{PREFIX}{path}.lora_B.weight"] = torch.nn.functional.pad(up, (0, pad)).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(joined, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(pairs),
        "task_type": "CAUSAL_LM",
    }
    write_atomic(folder / CONFIG_FILE, json.dumps(config))
