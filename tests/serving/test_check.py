"""`runtime serve --check` on a real tiny model: what it loads, in which format, and what it refuses."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from runtime import adapters, oci
from runtime.cli import main
from runtime.model_source import ModelSource
from runtime.serving import loading
from runtime.serving.engine.protocol import Request, Sampling
from runtime.serving.lifecycle import ServedModel
from runtime.serving.settings import AdapterSource, ServeConfig


@pytest.fixture(scope="module")
def folders(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters that change answers, `red` and `blue`."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(1)
    for name, rank in (("red", 4), ("blue", 2)):
        model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
        config = LoraConfig(
            r=rank, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        source = ModelSource(name="tiny", repository="someone/tiny")
        adapters.save(get_peft_model(model, config), root / name, source=source)
    return root


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main.run(["serve", *arguments, "--check", "--json"], {})
    return status, json.loads(capsys.readouterr().out or "{}")


@pytest.mark.parametrize(
    ("quantize", "weights"),
    [("none", "float32, "), ("nf4", "nf4 computed in float32, "), ("int8", "int8 computed in ")],
)
def test_model_is_loaded_in_the_format_requested_and_gives_a_token(
    tiny_llama_dir: Path, folders: Path, capsys: pytest.CaptureFixture[str], quantize: str, weights: str
) -> None:
    status, found = check(
        capsys, str(tiny_llama_dir), "--quantize", quantize, "--adapter", f"red={folders / 'red'}"
    )
    assert status == 0
    assert found["weights"].startswith(weights)
    assert found["adapters"] == ["red"]
    assert found["refused"] == []
    assert found["context_tokens"] == 2048
    assert found["peak_memory_bytes"] > 1 << 20


def test_sequences_at_a_time_are_the_engines_not_the_settings(
    tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(capsys, str(tiny_llama_dir))[1]["rows"] == 32
    monkeypatch.setattr("runtime.serving.engine.patch.refusal", lambda _: "unknown architecture")
    assert check(capsys, str(tiny_llama_dir))[1]["rows"] == 1


def test_table_is_for_people(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", str(tiny_llama_dir), "--check"], {}) == 0
    text = capsys.readouterr().out
    assert "peak_memory_bytes" in text
    assert " GiB" in text


def test_refused_adapter_is_named_and_the_status_says_so(
    tiny_llama_dir: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half/adapter_model.safetensors").write_bytes(b"")
    status, found = check(
        capsys, str(tiny_llama_dir),
        "--adapter", f"half={tmp_path / 'half'}", "--adapter", f"red={folders / 'red'}",
    )  # fmt: skip
    assert status == 2
    assert (found["adapters"], found["refused"]) == (["red"], ["half"])


def test_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert check(capsys, str(tmp_path))[0] == 2


@pytest.fixture
def combined(tiny_llama_dir: Path, folders: Path, tmp_path: Path, caplog: Any) -> Iterator[ServedModel]:
    """The tiny model with both adapters, and a bad one, as one."""
    caplog.set_level(logging.INFO)
    sources = {"red": (folders / "red", 1.0), "blue": (folders / "blue", 0.5), "none": (tmp_path, 1.0)}
    config = ServeConfig(
        model=ModelSource(name="tiny", path=tiny_llama_dir),
        served_name="tiny",
        adapters=tuple(
            AdapterSource(name=name, reference=str(folder), strength=strength)
            for name, (folder, strength) in sources.items()
        ),
        combine_adapters=True,
    )
    served = loading.load(config, oci.Access())
    yield served
    served.engine.close()
    served.tokenizer.close()


def test_an_adapter_that_nobody_foresaw_does_not_end_the_start(
    tiny_llama_dir: Path, folders: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, name: str) -> None:
        if name == "red":
            raise KeyError("what")

    monkeypatch.setattr(loading.adapters, "own_template", broken)
    config = ServeConfig(
        model=ModelSource(name="tiny", path=tiny_llama_dir),
        served_name="tiny",
        adapters=tuple(AdapterSource(name=n, reference=str(folders / n)) for n in ("red", "blue")),
    )
    served = loading.load(config, oci.Access())
    served.engine.close()
    served.tokenizer.close()
    assert (served.refused_adapters, served.engine.stats().adapters) == (["red"], ("blue",))
    assert "Adapter refused: red: KeyError: 'what'" in caplog.text


def test_combined_adapters_answer_for_the_base_as_merged_weights_would(
    combined: ServedModel, tiny_llama_dir: Path, folders: Path, caplog: Any
) -> None:
    """What KAITO's runtime does at each start, but exact: greedy tokens equal those of merged weights."""
    assert combined.default_adapter == "combined_adapter"
    assert combined.models() == ("tiny", "red", "blue", "combined_adapter")
    added = [record.getMessage() for record in caplog.get_records("setup")]
    assert "Adapter added: red" in added
    assert "Adapter added: blue" in added
    assert any(line.startswith("Adapter refused: none") for line in added)

    merged = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(merged, str(folders / "red"), adapter_name="red")
    tuned.load_adapter(str(folders / "blue"), adapter_name="blue")
    tuned.add_weighted_adapter(["red", "blue"], [1.0, 0.5], "both", combination_type="cat")
    tuned.set_adapter("both")
    prompt = combined.tokenizer.warm_up_prompt()
    with torch.inference_mode():
        expected = tuned.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip

    async def generated(adapter: str | None) -> list[int]:
        request = Request(prompt, Sampling(max_new_tokens=12), adapter=adapter, id="one")
        return [token.id async for token in combined.engine.submit(request) if token.id is not None]

    assert asyncio.run(generated(combined.default_adapter)) == expected
    assert asyncio.run(generated(None)) != expected, "these adapters change nothing: the test is blind"
