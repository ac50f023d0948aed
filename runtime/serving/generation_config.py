"""What a model's generation_config.json says about answers: sampling defaults.

Knows transformers' keys; does not know requests, tokenizers or files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling of requests that do not say otherwise; field names are those of the engine's `Sampling`."""

    temperature: float = 0.0
    """0 when the model does not ask for sampling, as transformers' `generate` has it."""
    sampled_temperature: float = 1.0
    """The temperature of a request that asks for sampling without giving one."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def sampling_defaults(generation_config: Mapping[str, Any]) -> SamplingDefaults:
    """Return the defaults that a model's generation_config states; what it leaves out is neutral."""
    temperature = float(generation_config.get("temperature") or 1.0)
    return SamplingDefaults(
        temperature=temperature if generation_config.get("do_sample") else 0.0,
        sampled_temperature=temperature,
        top_p=float(generation_config.get("top_p") or 1.0),
        top_k=int(generation_config.get("top_k") or 0),
        min_p=float(generation_config.get("min_p") or 0.0),
        repetition_penalty=float(generation_config.get("repetition_penalty") or 1.0),
    )
