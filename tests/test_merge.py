"""Merged models answer as base and adapter do, and plain transformers loads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime import adapters, merge, models
from runtime.cli.main import run
from runtime.errors import CapacityError, ConfigError
from runtime.hardware import Hardware
from runtime.model_source import ModelSource

CPU = Hardware("cpu", "test", None, 8 << 30, 1)


@pytest.fixture
def adapter_dir(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the tiny Llama whose update is far from zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "adapter"
    adapters.save(model, folder, source=ModelSource(name=str(tiny_llama_dir)))
    return folder


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.arange(40)[None] + 3).logits


def test_merged_logits_equal_base_and_adapter(
    tiny_llama_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "out" / "merged"
    assert run(["merge", str(adapter_dir), str(target)], {}) == 0
    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(adapter_dir)))
    merged = logits(AutoModelForCausalLM.from_pretrained(str(target), dtype=torch.float32))
    assert (merged - expected).abs().max() < 1e-5
    assert (merged - plain).abs().max() > 1e-2
    (weights,) = target.glob("*.safetensors")
    assert weights.stat().st_mode == (target / "config.json").stat().st_mode, "others may read them too"
    assert not [path for path in target.parent.iterdir() if path != target]
    made = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert run(["merge", str(adapter_dir), str(target)], {}) == 0, "the same again has its result"
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == made
    assert run(["merge", str(adapter_dir), str(target), "--dtype", "bfloat16"], {}) == 2, "another has not"
    tokenizer = AutoTokenizer.from_pretrained(str(target))
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )


OWN = "{% for m in messages %}### {{ m.role }}: {{ m.content }}{% endfor %}"


def test_a_tuned_adapter_brings_its_tokenizer_and_template(
    tiny_llama_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    """`tune` writes a tokenizer beside the adapter, and no configuration of a model."""
    from transformers import AutoTokenizer

    tokenizer = models.load_tokenizer(ModelSource(name="tiny", path=tiny_llama_dir, chat_template=OWN))
    models.save_tokenizer(tokenizer, adapter_dir)
    target = tmp_path / "merged"
    assert run(["merge", str(adapter_dir), str(target)], {}) == 0
    assert AutoTokenizer.from_pretrained(str(target)).chat_template == OWN
    assert (target / "generation_config.json").is_file()


def test_an_adapter_with_a_tokenizer_and_no_template_takes_that_of_its_base(
    tiny_llama_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_dir / name, adapter_dir)
    assert run(["merge", str(adapter_dir), str(tmp_path / "merged")], {}) == 0
    merged = AutoTokenizer.from_pretrained(str(tmp_path / "merged"))
    assert merged.chat_template == AutoTokenizer.from_pretrained(str(tiny_llama_dir)).chat_template


def test_a_16_bit_base_stays_16_bit(tiny_llama_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir), dtype=torch.bfloat16).save_pretrained(str(half))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (half / name).write_bytes((tiny_llama_dir / name).read_bytes())
    base = merge.base_of(adapter_dir, str(half))
    merge.merge(adapter_dir, tmp_path / "merged", base=base, machine=CPU)
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    merge.merge(adapter_dir, tmp_path / "whole", base=base, machine=CPU, dtype="float32")
    whole = AutoModelForCausalLM.from_pretrained(str(tmp_path / "whole"))
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}


def test_a_quantised_base_is_refused(tiny_llama_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    four = tmp_path / "four"
    four.mkdir()
    for path in tiny_llama_dir.iterdir():
        (four / path.name).write_bytes(path.read_bytes())
    config = json.loads((four / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (four / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantised \(bitsandbytes\): give its 16-bit original"):
        merge.merge(adapter_dir, tmp_path / "m", base=merge.base_of(adapter_dir, str(four)), machine=CPU)
    assert not (tmp_path / "m").exists()


def test_nothing_is_overwritten_and_little_memory_is_reported_first(
    tiny_llama_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    base = ModelSource(name="tiny", path=tiny_llama_dir)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        merge.merge(adapter_dir, tmp_path / "taken", base=base, machine=CPU)
    unfetched = ModelSource(name="far", image=f"oci:{tmp_path}/none:v1")
    with pytest.raises(ConfigError, match="exists already"):
        merge.merge(adapter_dir, tmp_path / "taken", base=unfetched, machine=CPU)
    small = Hardware("cpu", "test", None, 1 << 16, 1)
    with pytest.raises(CapacityError, match=r"takes .* GiB of memory"):
        merge.merge(adapter_dir, tmp_path / "new", base=base, machine=small)


def test_an_adapter_of_another_shape_is_refused_by_name(adapter_dir: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other"
    config = LlamaConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(other))
    with pytest.raises(ConfigError, match="adapter adapter does not fit"):
        merge.merge(adapter_dir, tmp_path / "m", base=ModelSource(name="o", path=other), machine=CPU)
    assert not (tmp_path / "m").exists()


def test_quantised_base_is_refused_whatever_type_is_requested(
    tiny_llama_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_dir, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    gpu = Hardware("cuda", "test", (7, 0), 16 << 30, 1)
    source = ModelSource(name="base", path=base)
    with pytest.raises(ConfigError, match=r"quantised \(awq\)"):
        merge.merge(adapter_dir, tmp_path / "merged", base=source, machine=gpu, dtype="float16")


ODD: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r"layers\.0\..*q_proj": 2},
        "alpha_pattern": {r".*layers\.1\..*v_proj": 64, "q_proj": 3},
    },
    "expression": {"target_modules": r".*\.(q|down)_proj", "exclude_modules": r".*layers\.0\..*q_proj"},
    "one layer": {"layers_to_transform": [1]},
    "whole modules": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "output layer": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
}


def tuned(base: Path, folder: Path, **options: Any) -> Any:
    """Save an adapter of the model in `base` with plain peft; return its logits in plain transformers."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(str(base)), LoraConfig(**settings | options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    fresh = AutoModelForCausalLM.from_pretrained(str(base))
    return logits(PeftModel.from_pretrained(fresh, str(folder)).eval())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word")
@pytest.mark.parametrize("options", ODD.values(), ids=ODD)
def test_what_peft_can_do_is_merged(tiny_llama_dir: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    expected = tuned(tiny_llama_dir, tmp_path / "a", **options)
    plain = logits(AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir)))
    assert (plain - expected).abs().max() > 1e-2
    base = merge.base_of(tmp_path / "a", str(tiny_llama_dir))
    merge.merge(tmp_path / "a", tmp_path / "merged", base=base, machine=CPU)
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_trained_with_further_tokens_brings_their_embeddings(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    wide = tmp_path / "wide"
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    model.resize_token_embeddings(520)
    model.save_pretrained(str(wide))
    tuned(wide, tmp_path / "a")
    trained = AutoModelForCausalLM.from_pretrained(str(wide))
    from peft import PeftModel

    whole = PeftModel.from_pretrained(trained, str(tmp_path / "a"))
    whole.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    base = merge.base_of(tmp_path / "a", str(tiny_llama_dir))
    merge.merge(tmp_path / "a", tmp_path / "merged", base=base, machine=CPU)
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(whole), atol=1e-5, rtol=1e-4)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"alora_invocation_tokens": [1, 2]},
            "cannot be merged: alora_invocation_tokens: the adapter begins",
        ),
        ({"layer_replication": [[0, 2], [0, 2]]}, "cannot be merged: layer_replication: "),
        ({"init_lora_weights": "pissa_niter_4"}, "cannot be merged: init_lora_weights is 'pissa_niter_4'"),
        ({"target_modules": ["q_proj"]}, "tensors belong to nothing that its adapter_config.json adapts"),
        ({"target_modules": ["no_such"]}, "does not fit"),
        ({"target_modules": "(q"}, "target_modules: '\\(q' is no regular expression"),
        ({"rank_pattern": {"q_proj": 2}}, "does not fit"),
        ({"use_dora": True}, "14 tensors are missing that its adapter_config.json adapts in this model, "),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    tiny_llama_dir: Path, adapter_dir: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    _edit(adapter_dir, **changes)
    base = merge.base_of(adapter_dir, str(tiny_llama_dir))
    with pytest.raises(ConfigError, match=f"adapter adapter:? .*{reason}") as caught:
        merge.merge(adapter_dir, tmp_path / "merged", base=base, machine=CPU)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_a_tokenizer_beyond_the_embeddings_is_refused(
    tiny_llama_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    base = ModelSource(name="tiny", path=tiny_llama_dir)
    tokenizer = models.load_tokenizer(base)
    tokenizer.add_tokens([f"<extra {n}>" for n in range(600 - len(tokenizer))])
    models.save_tokenizer(tokenizer, adapter_dir)
    with pytest.raises(ConfigError, match="its tokenizer has 600 tokens, the model 512"):
        merge.merge(adapter_dir, tmp_path / "merged", base=base, machine=CPU)
