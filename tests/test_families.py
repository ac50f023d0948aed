"""The records of model families: what each reader of theirs gets, and that transformers agrees."""

from typing import NamedTuple

import pytest

from runtime import families, presets
from runtime.families import FAMILIES, find


class Facts(NamedTuple):
    """What the readers of a record get from it."""

    engine: str | None
    packed: bool
    """Tuned in packs."""
    loss: bool
    """The output layer computes the loss."""
    fused: bool
    """Norms and MLPs are the tuner's."""
    renamed: str
    """Llama's names of modules that have others."""


FACTS = {
    "llama": Facts("decoder", True, True, True, ""),
    "mistral": Facts("decoder", True, True, True, ""),
    "qwen2": Facts("decoder", True, True, True, ""),
    "qwen3": Facts("decoder", True, True, True, ""),
    "phi3": Facts("decoder", True, True, True, "q k v gate up"),
    "olmo2": Facts(None, True, True, True, ""),
    "smollm3": Facts(None, True, True, True, ""),
    "phi": Facts("attention", True, True, False, "o up down"),
    "gemma": Facts("layers", True, True, False, ""),
    "gemma2": Facts("attention", False, False, False, ""),
    "gemma3_text": Facts("attention", True, False, False, ""),
    "gemma3": Facts(None, False, False, False, ""),
    "falcon": Facts("falcon", False, False, False, "q k v o up down"),
    "gpt_oss": Facts(None, False, False, False, ""),
    "gpt_neox": Facts(None, False, False, False, "q k v o up down"),
    "no record": Facts(None, False, False, False, ""),
}


@pytest.mark.parametrize("model_type", FACTS)
def test_each_reader_gets_what_was_tested_of_the_family(model_type: str) -> None:
    family = find(model_type)
    renamed = " ".join(name.removesuffix("_proj") for name in family.renames)
    assert FACTS[model_type] == (
        family.engine, family.packed, family.plain_logits, family.fused, renamed
    )  # fmt: skip


def test_the_engines_own_modules_are_for_families_with_split_or_fused_llama_projections() -> None:
    own = {name for name, family in FAMILIES.items() if family.own_layers}
    assert own == {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma"}


def test_targets_of_llama_have_these_names_in_other_families() -> None:
    assert families.modules_called("q_proj") == ("qkv_proj", "query_key_value", "Wqkv")
    assert families.modules_called("gate_proj") == ("gate_up_proj",)
    assert families.modules_called("up_proj") == ("gate_up_proj", "fc1", "dense_h_to_4h")
    assert families.modules_called("lm_head") == ()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_embeddings_are_tied_by_default_where_transformers_ties_them(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    assert find(model_type).tied_by_default == CONFIG_MAPPING[model_type]().tie_word_embeddings


def test_every_preset_but_these_has_a_record() -> None:
    without = {preset.model_type for preset in presets.all_presets()} - FAMILIES.keys()
    assert without == {"granite", "olmo3", "nemotron_h", "lfm2"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_loaded_as_a_causal_model_where_transformers_has_one(model_type: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert find(model_type).causal == (model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_families_that_leave_float16_are_those_that_were_published() -> None:
    known = {name: family.float16 for name, family in FAMILIES.items() if family.float16 != "works"}
    lost = {name for name, float16 in known.items() if float16 == "overflows"}
    assert lost == {
        "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gpt_oss", "glm4", "deepseek_v2",
        "deepseek_v3",
    }  # fmt: skip
    assert find("qwen3_moe").float16 == find("gemma4").float16 == "serves"
