"""What transformers makes of a configuration: weights and cache, counted on tensors without storage.

For the architectures that shape.py's arithmetic does not know: experts, latent attention, layers of several
kinds. Runs as a process of its own, `python -m runtime.memory.counting`, so that whoever plans imports no
torch; about 8 s, most of them imports. Does not know presets or bytes. Start at `count`.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import Field

from runtime.config import Strict, parse
from runtime.errors import ConfigError
from runtime.models import context_tokens
from runtime.presets import Dimensions

TIME_LIMIT_S = 300
"""For the process; a busy machine took 20 s."""
PROMPT_TOKENS = 8
"""Of the forward pass that fills the cache: fewer than any window."""


_LEFT_OUT = {"quantization_config", "auto_map", "architectures", "torch_dtype", "dtype"}
"""Of a configuration: what does not bear on the numbers, or names code and kernels that are not here."""


class CountedLinear(Strict):
    """A linear module, as often as the model has it."""

    path: str
    """Below its layer: "self_attn.q_proj"."""
    inputs: int
    outputs: int
    copies: int


class CacheSize(Strict):
    """Numbers that one sequence keeps while it is generated, all layers together."""

    token: int = Field(0, ge=0)
    """Of each token, in layers that keep all of them."""
    window_token: int = Field(0, ge=0)
    """Of each of the last `window` tokens, in layers that keep no more."""
    window: int = Field(0, ge=0)
    sequence: int = Field(0, ge=0)
    """Whatever the length: states of linear attention, Mamba and convolutions."""

    def values(self, tokens: int) -> int:
        """Return the numbers of a sequence of `tokens`."""
        return self.token * tokens + self.window_token * min(tokens, self.window) + self.sequence


class Counts(Strict):
    """The figures of one model."""

    dimensions: Dimensions
    """For what is estimated; where layers differ, of the typical one."""
    context_tokens: int
    parameters: int
    linears: tuple[CountedLinear, ...]
    """What bitsandbytes quantises and LoRA adapts: nn.Linear, without the output layer."""
    cache: CacheSize | None
    """None where the forward pass cannot be followed without numbers."""

    def shard(self, world: int) -> "Counts":
        """Return a `world`-th of weights and cache."""
        linears = tuple(it.model_copy(update={"outputs": it.outputs // world}) for it in self.linears)
        kept = None
        if self.cache is not None:
            sizes = {
                name: size // world for name, size in self.cache.model_dump().items() if name != "window"
            }
            kept = self.cache.model_copy(update=sizes)
        update = {"parameters": self.parameters // world, "linears": linears, "cache": kept}
        return self.model_copy(update=update)


def count(config: Mapping[str, Any]) -> Counts:
    """Return the figures of the model of a config.json; ConfigError where transformers builds none."""
    return _count(json.dumps(config, sort_keys=True))


@cache
def _count(config: str) -> Counts:
    command = [sys.executable, "-m", "runtime.memory.counting"]
    try:
        done = subprocess.run(  # noqa: S603
            command, input=config, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"counting the model's weights took more than {TIME_LIMIT_S} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"transformers builds no model of this configuration: {last[-300:]}")
    return parse(Counts, json.loads(done.stdout.splitlines()[-1]), "counted model")


def measure(config: dict[str, Any]) -> Counts:
    """Return the figures of the model of `config`, built here; imports torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    stated = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**stated)).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Counts(
        dimensions=_dimensions(model.config.get_text_config().to_dict()),
        context_tokens=context_tokens(model.config),
        parameters=parameters,
        linears=tuple(_linears(model)),
        cache=_cache(model),
    )


def _dimensions(config: Mapping[str, Any]) -> Dimensions:
    """Return the figures of a configuration that architectures name alike, and sizes of one layer of it."""

    def stated(*names: str, default: int) -> int:
        values = (config.get(name) for name in names)
        several = (max(value) if isinstance(value, list) and value else value for value in values)
        return next((int(value) for value in several if isinstance(value, int | float) and value), default)

    hidden, heads = stated("hidden_size", default=1), stated("num_attention_heads", default=1)
    shared = stated("n_shared_experts", "num_shared_experts", default=0)
    return Dimensions(
        layers=stated("num_hidden_layers", "n_layer", default=1),
        hidden=hidden,
        heads=heads,
        kv_heads=stated("num_key_value_heads", default=heads),
        head_dim=stated("head_dim", default=max(1, hidden // heads)),
        intermediate=stated("moe_intermediate_size", "intermediate_size", default=4 * hidden),
        vocabulary=stated("vocab_size", default=1),
        active_experts=stated("num_experts_per_tok", "top_k_experts", "moe_topk", default=1) + shared,
    )


def _linears(model: Any) -> Iterator[CountedLinear]:
    from torch import nn

    head = model.get_output_embeddings()
    found = Counter(
        (re.sub(r"^.*?\.\d+\.", "", name), module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    for (path, inputs, outputs), copies in found.items():
        yield CountedLinear(path=path, inputs=inputs, outputs=outputs, copies=copies)


def _cache(model: Any) -> CacheSize | None:
    """Return what a prompt leaves in transformers' own cache, layer by layer."""
    import torch
    from transformers import DynamicCache

    for module in model.modules():
        if type(module).__name__.endswith("Experts"):  # which of them a token goes to depends on numbers
            module.forward = lambda hidden_states, *_, **__: hidden_states
    filled = DynamicCache(config=model.config.get_text_config())
    prompt = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=filled, use_cache=True)
    except Exception:
        return None
    sizes = Counter[str]()
    for layer in filled.layers:
        windowed = getattr(layer, "sliding_window", None)
        kept = _numbers(getattr(layer, "keys", None)) + _numbers(getattr(layer, "values", None))
        sizes["window_token" if windowed else "token"] += kept // PROMPT_TOKENS
        sizes["window"] = max(sizes["window"], int(windowed or 0))
        states = (getattr(layer, name, None) for name in ("conv_states", "recurrent_states"))
        sizes["sequence"] += sum(map(_numbers, states))
    return CacheSize(**sizes)


def _numbers(held: Any) -> int:
    """Return how many numbers are in a tensor, or in the tensors of a dictionary or list."""
    if isinstance(held, dict):
        held = list(held.values())
    if isinstance(held, list | tuple):
        return sum(map(_numbers, held))
    return int(held.numel()) if hasattr(held, "numel") else 0


def _main() -> None:
    """Count the configuration on standard input; the last line of output is the result, or of errors why."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    try:
        sys.stdout.write(measure(json.load(sys.stdin)).model_dump_json() + "\n")
    except Exception as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"{type(error).__name__}: {reason[:300]}") from None


if __name__ == "__main__":
    _main()
