"""Which base model, and how to read it: the settings that tuning and serving have in common.

Plain values: does not know presets (runtime/presets.py creates these), the hub or torch
(runtime/models.py reads the weights).
"""

from pathlib import Path
from typing import Any, Literal

from runtime.config import Strict

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
"""A compute type; "auto" lets the hardware decide."""


class ModelSource(Strict):
    """Which base model, and how to read it."""

    name: str
    """What the user called it: a preset's name, a Hugging Face repository id or a directory."""
    repository: str | None = None
    """Hugging Face repository id; null when `name` is a local directory."""
    revision: str | None = None
    """Commit of the repository (40 hex digits, as presets have it), tag or branch; null is its main branch.
    A tag or branch is said in the dry run: it may be another commit later."""
    path: Path | None = None
    """Local directory with the weights, used instead of the hub when given."""
    image: str | None = None
    """Image or artifact with the weights, `registry/repository:tag` or `oci:DIRECTORY[:tag]`."""
    required_keys: tuple[str, ...] = ()
    """Public keys, files or PEM text, one of which must have signed each image that is pulled: the model's,
    adapters, data, checkpoints. () requires none, or what RUNTIME_REQUIRE_SIGNATURE names."""
    package: str | None = None
    """Python package that ships the weights as GGUF, used when the hub cannot be reached."""
    local_files_only: bool = False
    """Never contact the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless the user asks."""
    dtype: Dtype = "auto"
    """Compute type; "auto" lets the hardware decide."""
    chat_template: str | None = None
    """Jinja text that replaces the tokenizer's own chat template."""
    attention: str | None = None
    """transformers attention implementation; null lets the hardware decide."""


class Quantization(Strict):
    """bitsandbytes quantisation of the frozen base weights (QLoRA, arXiv:2305.14314, section 3)."""

    bits: Literal[4, 8] = 4
    """Bits per weight."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit codebook."""
    double_quant: bool = True
    """Quantise the quantisation constants too (saves 0.37 bit per weight)."""
    compute_dtype: Dtype = "auto"
    """Type of the matrix products; "auto" lets the hardware decide."""
    options: dict[str, Any] = {}
    """Further arguments of BitsAndBytesConfig."""
