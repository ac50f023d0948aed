"""LoRA adapters on disk: find, check, combine and save them; an incomplete adapter folder is refused by name.

Plain files: `adapter_config.json` and `adapter_model.safetensors` (peft's format). Images are pulled by
runtime/oci. Needs torch only to combine and save. Start at folder.py; what peft's keys mean stands in
lora_config.py.
"""

from runtime.adapters.combination import combine
from runtime.adapters.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    check,
    check_served,
    find,
    local_copy,
    no_directory,
    read_config,
    within,
)
from runtime.adapters.lora_config import LoraFields
from runtime.adapters.own_template import check_tokens, own_template
from runtime.adapters.saving import save

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Adapter",
    "LoraFields",
    "check",
    "check_served",
    "check_tokens",
    "combine",
    "find",
    "local_copy",
    "no_directory",
    "own_template",
    "read_config",
    "save",
    "within",
]
