"""An adapter from `tune` answers alike served, merged and served, in plain peft, merged in transformers."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime.cli.main import run as command
from runtime.model_source import ModelSource
from runtime.oci.access import DEFAULT
from runtime.serving import loading
from runtime.serving.lifecycle import ServedModel
from runtime.serving.settings import ServeConfig
from runtime.tuning import launcher
from tests import families
from tests.conftest import write_tiny_tokenizer
from tests.serving.engine.calls import generate, make_request, run
from tests.tuning.conftest import tiny_job

FAMILIES = [
    pytest.param("llama", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen2", "phi3", "gemma", "mistral")),
]
OWN = (
    "{% for m in messages %}### {{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
QUESTIONS = ("what is 3", "the quick brown fox", "a lazy dog answers")
ODD: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r"layers\.0\..*q_proj": 2},
        "alpha_pattern": {r".*layers\.1\..*v_proj": 64, "q_proj": 3},
    },
    "expression": {"target_modules": r".*\.(q|down)_proj", "exclude_modules": r".*layers\.0\..*q_proj"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder)).eval()


@contextlib.contextmanager
def served(model: Path, **adapters: Path) -> Iterator[ServedModel]:
    """Serve a model with adapters as `serve` does, without HTTP."""
    sources = [{"name": name, "reference": str(folder)} for name, folder in adapters.items()]
    config = {"model": {"name": "m", "path": str(model)}, "served_name": "m", "adapters": sources}
    loaded = loading.load(ServeConfig.model_validate(config | {"limits": {"rows": 4}}), DEFAULT)
    try:
        yield loaded
    finally:
        loaded.engine.close()
        loaded.tokenizer.close()


def compare(model: Path, adapter: Path, merged: Path) -> None:
    """Hold the four ways of asking one adapter to each other, with the prompts that the server makes."""
    with served(model, a=adapter) as beside, served(merged) as alone:
        assert beside.models() == ("m", "a")
        turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
        prompts = [asyncio.run(beside.tokenizer_for("a").prompt_from_chat(each)) for each in turns]
        assert prompts == [asyncio.run(alone.tokenizer.prompt_from_chat(each)) for each in turns]
        ours = [ids for ids, _ in run(beside.engine, *requests(prompts, "a"))]
        whole = [ids for ids, _ in run(alone.engine, *requests(prompts, None))]
    plain = PeftModel.from_pretrained(load(model), str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(merged))
    for turn, prompt in zip(turns, prompts, strict=True):
        told = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert tuple(told) == prompt
    expected = [generate(plain, prompt) for prompt in prompts]
    assert ours == expected
    assert whole == expected
    assert [generate(load(merged), prompt) for prompt in prompts] == expected
    assert [generate(load(model), prompt) for prompt in prompts] != expected, "an adapter without effect"


def requests(prompts: list[tuple[int, ...]], adapter: str | None) -> list[Any]:
    ending = {"stop_ids": frozenset()}
    return [make_request(prompt, adapter=adapter, id=str(n), **ending) for n, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.dumps({"prompt": f"what is {n}", "completion": f"it is {n} {n}"}) for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_adapter_answers_alike_however_it_is_asked(family: str, rows: Path, tmp_path: Path) -> None:
    """QLoRA with bitsandbytes, with a chat template of the job's own."""
    model, adapter, merged = (tmp_path / name for name in ("model", "adapter", "merged"))
    families.model_of(family, vocab_size=512).save_pretrained(str(model))
    write_tiny_tokenizer(model)
    source = ModelSource(name="tiny", path=model, chat_template=OWN)
    training = {"max_steps": 6, "learning_rate": 0.02, "per_device_train_batch_size": 4}
    launcher.run(tiny_job(model, rows, adapter, model=source, training=training), processes=1)
    assert command(["merge", str(adapter), str(merged), "--model", str(model)], {}) == 0
    compare(model, adapter, merged)
    assert AutoTokenizer.from_pretrained(str(merged)).chat_template == OWN


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose answers vary."""
    folder = tmp_path_factory.mktemp("varied")
    families.model_of("llama", vocab_size=512).save_pretrained(str(folder))
    write_tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize("options", ODD.values(), ids=ODD)
def test_odd_adapters_answer_alike_however_they_are_asked(
    varied: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    save_odd(varied, adapter, options)
    assert command(["merge", str(adapter), str(merged), "--model", str(varied)], {}) == 0
    compare(varied, adapter, merged)


def save_odd(model: Path, folder: Path, options: dict[str, Any]) -> None:
    """Save an adapter with plain peft, its weights far from none."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", **settings | options)
    adapted = get_peft_model(load(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def test_an_adapter_that_cannot_be_served_is_served_once_merged(
    varied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    save_odd(varied, adapter, {"use_dora": True})
    with served(varied, a=adapter) as beside:
        assert beside.models() == ("m",)
    assert (
        "Adapter refused: a: adapter a: cannot be served as an adapter: use_dora: DoRA scales" in caplog.text
    )
    assert command(["merge", str(adapter), str(merged), "--model", str(varied)], {}) == 0
    prompt = (5, 17, 230, 41, 9)
    with served(merged) as alone:
        ((ids, _),) = run(alone.engine, *requests([prompt], None))
    assert ids == generate(PeftModel.from_pretrained(load(varied), str(adapter)).eval(), prompt)
