"""Converts a model that a Python package ships as GGUF to a Hugging Face directory.

For machines that cannot reach the hub, such as the demo's. Start at `convert`.
"""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import logs
from runtime.errors import ConfigError
from runtime.files import atomic_folder, locked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def convert(package: str, folder: Path) -> Path:
    """Write the GGUF model that `package` ships to `folder`, as float32 safetensors, once and atomically.

    One process converts while others of the same job wait for it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"another process converts {package}: waiting for it"
    with locked(folder.with_name(f".{folder.name}.lock"), waiting=waiting):
        if (folder / "config.json").exists():
            return folder
        spec = find_spec(package)
        home = Path(spec.origin).parent if spec and spec.origin else Path()
        weights = next(iter(sorted(home.rglob("*.gguf"))), None)
        if weights is None:
            raise ConfigError(f"package {package} in {home}: no .gguf file; expected the model's weights")
        log.info("Converting %s of the package %s to %s", weights.name, package, folder)
        with logs.quiet_progress():
            model = AutoModelForCausalLM.from_pretrained(
                str(weights.parent), gguf_file=weights.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name)
        with atomic_folder(folder) as new:
            _write_float32(model, new)
            tokenizer.save_pretrained(str(new))
    return folder


def _write_float32(model: "PreTrainedModel", folder: Path) -> None:
    """Save a model that was read from GGUF; transformers refuses to while it calls itself quantised.

    A matrix that input and output share is written under its input's name, where every reader looks first.
    """
    from safetensors.torch import save_file

    config = model.config.to_dict()
    config.pop("quantization_config", None)
    type(model.config)(**config).save_pretrained(str(folder))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))
    tensors = {name: weights.detach().contiguous() for name, weights in model.named_parameters()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
