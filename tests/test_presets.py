"""Presets: every one is complete, true to transformers' own classes and to the size of its files."""

from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import families, presets
from runtime.config import parse
from runtime.errors import ConfigError
from runtime.memory import counting
from runtime.presets import Preset, all_presets, find, source

PRESETS = all_presets()
IDS = [preset.name for preset in PRESETS]
every_preset = pytest.mark.parametrize("preset", PRESETS, ids=IDS)

FAMILIES = {
    "Falcon", "Llama 3", "Mistral", "Phi-2", "Phi-3", "Phi-3.5", "Phi-4", "Qwen2.5-Coder",
    "DeepSeek-R1-Distill", "Gemma 3", "gpt-oss", "SmolLM2", "Gemma 4", "Granite 4.1", "Ministral 3",
    "Nemotron Nano", "Qwen3", "Qwen3.5", "SmolLM3", "OLMo 3", "GLM-4", "LFM2",
}  # fmt: skip


def test_every_promised_family_is_there() -> None:
    assert {preset.family for preset in PRESETS} == FAMILIES


def test_revisions_that_kaito_pins_are_pinned() -> None:
    pinned = [preset for preset in PRESETS if preset.revision is not None]
    assert len(pinned) == 28
    assert {find(name).revision for name in ("ministral-3-3b-instruct", "phi-4", "gpt-oss-20b")} == {
        "83e15808ff6a115f18ff8e68123db3ab35035714",
        "187ef0342fff0eb3333be9f00389385e95ef0b61",
        "db6852caddef0cf0c1f729034ed700c84eab376e",
    }


UNIFORM = [preset for preset in PRESETS if preset.dimensions is not None]
COUNTED = [preset for preset in PRESETS if preset.dimensions is None]


@pytest.mark.parametrize("preset", UNIFORM, ids=lambda preset: preset.name)
def test_shape_agrees_with_the_size_of_the_files(preset: Preset) -> None:
    if preset.quantized is not None:
        pytest.skip("files are quantised: test_expert_weights_take_a_quarter holds those in MXFP4")
    dimensions = preset.dimensions
    assert dimensions is not None
    repeated = dimensions.vocabulary * dimensions.hidden if preset.stored_head else 0
    expected = 2 * (dimensions.parameters + repeated)
    assert preset.download_gib * 2**30 == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b"])
def test_expert_weights_take_a_quarter(name: str) -> None:
    preset = find(name)
    shape = preset.dimensions
    assert shape is not None
    experts = shape.layers * shape.experts * 3 * shape.hidden * shape.intermediate
    # MXFP4: 32 values of 4 bits share a scale of 8; the rest is bfloat16.
    expected = experts * 4.25 / 8 + 2 * (shape.parameters - experts)
    assert preset.download_gib * 2**30 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("preset", COUNTED, ids=lambda preset: preset.name)
def test_presets_whose_layers_differ_count_what_transformers_counts(preset: Preset) -> None:
    counted = counting.measure(preset.configuration or {})
    assert preset.counted_parameters == pytest.approx(counted.parameters, rel=0.001)
    assert counted.cache is not None
    # beside the text model, files may hold towers and a head for several tokens
    stored = preset.download_gib * 2**30 / 2
    assert preset.parameters <= stored * 1.005
    assert preset.parameters >= stored * 0.8


@pytest.mark.parametrize("preset", UNIFORM, ids=lambda preset: preset.name)
def test_class_and_parameters_are_those_of_transformers(preset: Preset) -> None:
    """Builds the real class from the preset's numbers, without memory, and counts."""
    import torch
    import transformers

    assert preset.dimensions is not None
    with torch.device("meta"):
        model = getattr(transformers, preset.architecture)(_configuration(preset))
    counted = sum(parameter.numel() for parameter in model.parameters())
    other = preset.dimensions.other_parameters
    if other:
        counted -= sum(
            p.numel() for n, p in model.named_parameters() if "language_model" not in n and "lm_head" not in n
        )
    assert counted == pytest.approx(preset.dimensions.parameters - other, rel=0.002)
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    renames = families.find(preset.model_type).renames
    assert set(renames.values()) <= leaves
    assert not set(renames) & leaves, "a name that exists must not be renamed"


def _configuration(preset: Preset) -> object:
    from transformers import AutoConfig

    shape = preset.dimensions
    assert shape is not None
    common = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "tie_word_embeddings": shape.tied_embeddings,
        "pad_token_id": 0,
    }
    if preset.model_type == "falcon":
        common = {
            key: value
            for key, value in common.items()
            if key not in ("head_dim", "num_key_value_heads", "intermediate_size")
        }
        return AutoConfig.for_model(
            "falcon",
            **common,
            ffn_hidden_size=shape.intermediate,
            num_kv_heads=shape.kv_heads,
            multi_query=shape.kv_heads == 1,
            new_decoder_architecture=shape.kv_heads > 1,
        )
    if preset.model_type == "gemma3":
        vision = {"num_hidden_layers": 1}
        return AutoConfig.for_model(
            "gemma3", text_config=common, vision_config=vision, tie_word_embeddings=True
        )
    if preset.model_type == "mistral3":
        vision = {"num_hidden_layers": 1}
        return AutoConfig.for_model(
            "mistral3",
            text_config={"model_type": "ministral3", **common},
            vision_config=vision,
            tie_word_embeddings=shape.tied_embeddings,
        )
    if preset.model_type == "gpt_oss":
        common |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.active_experts}
    return AutoConfig.for_model(preset.model_type, **common)


@pytest.mark.parametrize(
    ("name", "window", "full"),
    [("gemma-3-4b-instruct", 1024, 5), ("gemma-3-27b-instruct", 1024, 10), ("gpt-oss-20b", 128, 12)],
)
def test_sliding_windows_are_those_of_transformers(name: str, window: int, full: int) -> None:
    configuration = _configuration(find(name))
    text = getattr(configuration, "text_config", configuration)
    dimensions = find(name).dimensions
    assert dimensions is not None
    assert text.layer_types.count("full_attention") == full == dimensions.full_attention_layers
    assert window == dimensions.sliding_window


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Who?"},
]

RENDERED = {
    "phi-3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi<|end|>\n"
    "<|user|>\nWho?<|end|>\n<|assistant|>\n",
    "phi-4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|>"
    "<|im_start|>assistant<|im_sep|>Hi<|im_end|><|im_start|>user<|im_sep|>Who?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
    "phi-2": "Instruct: Be brief.\nHello\nOutput: Hi</s>\nInstruct: Who?\nOutput:",
    "falcon-instruct": "Be brief.\n\nUser: Hello\n\nAssistant: Hi</s>\n\nUser: Who?\n\nAssistant:",
    "mistral-instruct": "<s>[INST] Hello[/INST] Hi</s>[INST] Be brief.\n\nWho?[/INST]",
    "llama-3-instruct": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
TEMPLATES = sorted((presets.FOLDER / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_chat_template_renders_the_documented_format(file: Path) -> None:
    assert _render(file, CONVERSATION) == RENDERED[file.stem]


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_chat_template_marks_the_answers_and_their_end(file: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, spans = render_jinja_template(
        [CONVERSATION],
        chat_template=file.read_text(),
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    answers = [rendered[0][start:end] for start, end in spans[0]]
    assert len(answers) == 1
    assert answers[0].strip().startswith("Hi")
    assert answers[0].endswith(("</s>", "<|end|>", "<|im_end|>", "<|eot_id|>"))


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_chat_template_refuses_an_unknown_role(file: Path) -> None:
    with pytest.raises(jinja2.TemplateError, match="unknown role"):
        _render(file, [{"role": "oracle", "content": "x"}])


def _render(file: Path, messages: list[dict[str, str]]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [messages],
        chat_template=file.read_text(),
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    return str(rendered[0])


@given(st.sampled_from(PRESETS), st.sampled_from([str.upper, str.lower, str.title]))
def test_names_aliases_and_repositories_are_found_in_any_case(preset: Preset, case: object) -> None:
    for name in (preset.name, preset.repository, *preset.aliases):
        assert find(case(name)) == preset  # type: ignore[operator]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("phi-3-mini-128k-instuct", "phi-3-mini-128k-instruct"),
        ("falcon7b", "falcon-7b"),
        ("phi-3", "phi-3-mini-4k-instruct"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(written: str, meant: str) -> None:
    with pytest.raises(ConfigError, match="unknown preset") as caught:
        find(written)
    assert repr(meant) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "llama-2-7b-chat",
            r"was retired by KAITO; use llama-3\.1-8b-instruct, or the repository meta-llama/",
        ),
        ("Llama-2-70B", r"was retired by KAITO; use llama-3\.3-70b-instruct"),
        ("deepseek-r1-0528", r"670 billion weights.*use deepseek-r1-distill"),
        ("deepseek-v3-0324", "670 billion weights"),
        ("mistral-large-3-675b-instruct", r"670 billion weights.*use ministral-3-14b-instruct"),
    ],
)
def test_names_of_kaitos_that_are_no_presets_say_what_to_use(name: str, said: str) -> None:
    for ask in (find, source):
        with pytest.raises(ConfigError, match=said):
            ask(name)


def test_a_preset_has_dimensions_or_a_configuration() -> None:
    facts = find("phi-4").model_dump()
    for wrong in ({"dimensions": None}, {"configuration": {"model_type": "phi3"}, "counted_parameters": 1}):
        with pytest.raises(
            ConfigError, match="expected dimensions, or configuration with counted_parameters"
        ):
            parse(Preset, {**facts, **wrong}, "preset")


def test_source_takes_preset_directory_and_repository(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert source("Phi-4").repository == "microsoft/phi-4"
    assert source(str(tmp_path)).path == tmp_path
    assert source("someone/a-model").repository == "someone/a-model"


@pytest.mark.parametrize("wrong", ["no-such-model", "a/b/c", "./missing", "/missing/model", "../x", ""])
def test_source_refuses_what_is_none_of_them(wrong: str) -> None:
    with pytest.raises(ConfigError):
        source(wrong)


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        source(str(tmp_path))


def test_base_models_without_a_template_get_one() -> None:
    assert all(
        find(name).source().chat_template
        for name in ("falcon-7b", "falcon-40b-instruct", "phi-2", "mistral-7b")
    )
    assert find("phi-4").source().chat_template is None


def test_misspelt_fact_is_named_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (presets.FOLDER / "phi-2.toml").read_text().replace("context_tokens", "context_tokns")
    (tmp_path / "phi-2.toml").write_text(text)
    (tmp_path / "chat_templates").symlink_to(presets.FOLDER / "chat_templates")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    presets._index.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"phi-2\.toml: phi-2: .*'context_tokens'"):
            all_presets()
    finally:
        presets._index.cache_clear()
