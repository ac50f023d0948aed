"""What LoraConfig's keys mean here is what they mean in the installed peft."""

import dataclasses
import random

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from runtime.adapters import lora_config
from runtime.adapters.lora_config import LoraFields

PATHS = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 11)
    for module in (
        "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.experts.1.up_proj",
        "q_proj", "cross_attn.q_proj",
    )
] + ["lm_head", "model.embed_tokens", "q_proj", "h.0.q_proj", "visual.blocks.1.q_proj"]  # fmt: skip

NAMES = [
    "q_proj", "v_proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
    "proj",
    "self.attn.q_proj", "^model.layers.0.self_attn.q_proj", "q_proj$", r"layers\.0\..*q_proj",
    r".*layers\.0\..*q_proj",
    r"layers\.[0-9]\.self_attn\.(q|v)_proj", "q_proj|v_proj", "mlp", "experts.1.up_proj", ".*", "", "lm_head",
    r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj))", r"\w+\.\w+", "Q_PROJ", r"1\.q_proj",
]  # fmt: skip


def test_every_key_of_the_installed_peft_has_its_place() -> None:
    keys = {field.name for field in dataclasses.fields(LoraConfig)}
    assert keys == lora_config.KNOWN
    assert lora_config.NOT_MERGED.keys() <= lora_config.NOT_SERVED.keys()
    assert not lora_config.WITHOUT_EFFECT & lora_config.NOT_SERVED.keys()
    plain = dataclasses.asdict(LoraConfig(target_modules=["q_proj"]))
    assert lora_config.not_served(plain) == lora_config.not_merged(plain) == []


@pytest.mark.parametrize("seed", range(40))
def test_ranks_and_scalings_by_pattern_are_pefts(seed: int) -> None:
    draw = random.Random(seed)
    rank_pattern = {name: draw.randint(1, 64) for name in draw.sample(NAMES, draw.randint(0, 4))}
    alpha_pattern = {name: draw.choice([1, 8, 32.5]) for name in draw.sample(NAMES, draw.randint(0, 4))}
    fields = LoraFields(
        r=4, lora_alpha=8, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, use_rslora=seed % 2 == 1
    )
    ranks = lora_config.ranks(fields, PATHS)
    scalings = lora_config.scalings(fields, ranks)
    for path in PATHS:
        rank = rank_pattern.get(get_pattern_key(rank_pattern.keys(), path), 4)
        alpha = alpha_pattern.get(get_pattern_key(alpha_pattern.keys(), path), 8)
        assert ranks[path] == rank
        assert scalings[path] == pytest.approx(alpha / (rank**0.5 if fields.use_rslora else rank))


@pytest.mark.parametrize("seed", range(60))
def test_the_modules_that_are_adapted_are_pefts(seed: int) -> None:
    draw = random.Random(seed)
    plain = [name for name in NAMES if not set(name) & set("\\^$|*(+")]
    options: dict[str, object] = {"target_modules": draw.sample(plain, draw.randint(1, 3))}
    if seed % 3 == 0:
        options = {"target_modules": draw.choice(NAMES)}
    elif seed % 3 == 1:
        options["layers_to_transform"] = draw.choice([0, 1, [1], [0, 11], []])
        options["layers_pattern"] = draw.choice([None, "layers", ["blocks", "layers"], "h", "l.*", []])
        if not options["layers_pattern"]:
            del options["layers_pattern"]
    if draw.random() < 0.5:
        options["exclude_modules"] = draw.choice([draw.choice(NAMES), draw.sample(plain, 2)])
    if draw.random() < 0.3:
        options["modules_to_save"] = draw.sample(["lm_head", "mlp", "q_proj", "embed_tokens"], 2)
    theirs = LoraConfig(**options)  # type: ignore[arg-type]
    expected = {path for path in PATHS if check_target_module_exists(theirs, path)}
    fields = LoraFields.model_validate({"r": 4} | options)
    assert lora_config.targeted(fields, PATHS) == expected, options
