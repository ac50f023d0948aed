"""docs/settings.md is what the code says: every setting, and what becomes of every key of KAITO's sections.

To write the page's tables anew: `python -m tests.workspace.test_settings_page`.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from runtime.adapters import lora_config
from runtime.cli import main
from runtime.errors import ConfigError
from runtime.tuning.arguments import lora, optimizers, training
from runtime.tuning.settings import TuningJob
from runtime.workspace import Resolved, names, sections
from tests.workspace.documents import SEED, load

PAGE = Path(__file__).parents[2] / "docs/settings.md"
START, END = "<!-- settings -->\n", "<!-- /settings -->\n"

SAMPLES: Mapping[str, Mapping[str, Any]] = {
    "ModelConfig": {
        "pretrained_model_name_or_path": "Qwen/Qwen3-0.6B", "revision": "main", "torch_dtype": "float16",
        "dtype": "float16", "chat_template": "{{ messages }}", "trust_remote_code": True,
        "local_files_only": True, "attn_implementation": "eager", "device_map": "cpu", "state_dict": {"a": 1},
        "cache_dir": "x", "force_download": True, "proxies": {"a": "b"}, "output_loading_info": True,
        "from_tf": True, "resume_download": False, "load_in_4bit": True, "load_in_8bit": True,
    },
    "QuantizationConfig": {
        "quant_method": "gptq", "load_in_4bit": True, "load_in_8bit": True, "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 5.0, "llm_int8_skip_modules": ["a"],
        "llm_int8_enable_fp32_cpu_offload": True, "llm_int8_has_fp16_weight": True,
    },
    "LoraConfig": {"r": 4, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
    "DatasetConfig": {
        "dataset_path": "rows.parquet", "dataset_extension": "csv", "shuffle_dataset": False,
        "shuffle_seed": 1, "context_column": "a", "response_column": "b", "messages_column": "c",
        "train_test_split": 0.9,
    },
}  # fmt: skip
"""A value for each key that is given to no library as it is; none of them is a default."""

UNITS = {"bytes": "bytes", "tokens": "tokens", "minutes": "minutes", "share": "0 to 1", "bits": "bits"}
"""By the last word of a setting's name."""


def settings() -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting under its dotted name, those of a group after one another."""
    groups = names.groups()
    for name, field in TuningJob.model_fields.items():
        if name in groups and name != "training":
            model = next(kind for kind in (field.annotation, *get_args(field.annotation)) if is_model(kind))
            yield from ((f"{name}.{inner}", inside) for inner, inside in model.model_fields.items())
        elif name not in names.NOT_SET | {"hub_token"}:
            yield name, field


def is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def type_text(kind: Any) -> str:
    """Return a type in a reader's words."""
    words = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        Path: "path",
        dict: "keys and values",
    }
    if kind in words:
        return words[kind]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return "list"
    if get_origin(kind) is dict:
        return "keys and values"
    inner = [type_text(part) for part in get_args(kind) if part is not type(None)]
    return " or ".join(dict.fromkeys(inner)) if inner else "text"


def value_text(value: Any) -> str:
    if value is None or value in ((), {}, ""):
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def unit(name: str) -> str:
    return UNITS.get(name.rpartition(".")[2].rpartition("_")[2], "")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def one_key(section: str, key: str, value: Any) -> Resolved[TuningJob] | str:
    """Return the job of a file with one key, or why that key is refused."""
    quantised = {} if (section, key[:7]) == ("QuantizationConfig", "load_in") else {"load_in_4bit": True}
    content = {"QuantizationConfig": quantised}
    content[section] = {**content.get(section, {}), key: value}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "own.yaml"
        config.write_text(yaml.safe_dump({"training_config": content}))
        try:
            return load(SEED, Path(folder), config=config)
        except ConfigError as error:
            return str(error)


def becomes(section: str, key: str, value: Any) -> tuple[list[str], str]:
    """Return the settings that a key becomes, and what else is said of it."""
    found = one_key(section, key, value)
    if isinstance(found, str):
        return [], f"refused: {found.partition(f'{section}.{key} ')[2] or found}"
    label = f"own.yaml {section}.{key}"
    changed = sorted(
        name for name, source in found.sources.items() if label in source.split(" (")[0].split(",")
    )
    said = [warning.partition(f"{label} ")[2] for warning in found.warnings if label in warning]
    return changed, "; ".join(said)


def kaito_keys() -> dict[str, list[str]]:
    """Return KAITO's keys of each setting of ours."""
    keys: dict[str, list[str]] = {}
    for setting, source in load(SEED, Path("empty")).sources.items():
        if source.startswith(f"{SEED.name} "):
            keys.setdefault(setting, []).append(source.removeprefix(f"{SEED.name} "))
    for section, samples in SAMPLES.items():
        for key, value in samples.items():
            for setting in becomes(section, key, value)[0]:
                keys.setdefault(setting, []).append(f"{section}.{key}")
    for key, setting in OTHERS.items():
        keys.setdefault(setting, []).append(f"TrainingArguments.{key}")
    keys["lora.options"] = ["LoraConfig, other keys"]
    keys["quantization.options"] = ["QuantizationConfig, other keys"]
    keys["training"] = ["TrainingArguments"]
    return keys


OTHERS = {
    "max_length": "encoding.max_tokens",
    "packing": "encoding.batching",
    "assistant_only_loss": "encoding.loss_on",
    "dataset_text_field": "data.response_column",
    "output_dir": "output.folder",
    "fsdp": "parallel",
}
"""Keys of TrainingArguments that are settings of ours."""


def tables() -> str:
    """Return the page's tables."""
    return "\n".join([*our_table(), *section_tables(), *lora_table(), *argument_tables()]) + "\n"


def our_table() -> Iterator[str]:
    keys = kaito_keys()
    yield "## Settings\n"
    yield "| `--set` name | type | default | unit | what it is | KAITO's key |\n|---|---|---|---|---|---|"
    for name, field in settings():
        default = "–" if field.is_required() else value_text(field.get_default(call_default_factory=True))
        kaito = ", ".join(f"`{key}`" for key in keys.get(name, ()))
        kind = type_text(field.annotation)
        yield f"| `{name}` | {kind} | {default} | {unit(name)} | {cell(field.description or '')} | {kaito} |"


def section_tables() -> Iterator[str]:
    for section, samples in SAMPLES.items():
        if section == "LoraConfig":
            continue
        yield f"\n## {section}\n\n| key | becomes |\n|---|---|"
        for key, value in samples.items():
            changed, said = becomes(section, key, value)
            text = ", ".join(f"`{name}`" for name in changed)
            yield f"| `{key}` | {cell('; '.join(filter(None, (text, said))))} |"
    yield "\n## DataCollator\n"
    yield "Its keys have no effect: batches for a causal model have nothing to choose here."


def lora_table() -> Iterator[str]:
    yield "\n## LoraConfig\n\n| key | becomes |\n|---|---|"
    ours = {
        key: f"`{becomes('LoraConfig', key, value)[0][0]}`" for key, value in SAMPLES["LoraConfig"].items()
    }
    for key, text in ours.items():
        yield f"| `{key}` | {text} |"
    for key in sorted(lora.LoraOptions.model_fields):
        why = lora_config.NOT_SERVED.get(key)
        note = f"; trained, and not served here: {why}" if why else ""
        yield f"| `{key}` | given to peft{note} |"
    for key, right in lora.FIXED.items():
        yield f"| `{key}` | `{right}` |"
    for key, why in lora.HARMLESS.items():
        yield f"| `{key}` | no effect: {why} |"
    for key, why in lora.REFUSED.items():
        yield f"| `{key}` | refused: {why} |"


def argument_tables() -> Iterator[str]:
    yield "\n## TrainingArguments\n"
    yield "transformers' arguments and trl's `SFTConfig`'s; without a default here, the library's applies.\n"
    yield "### Carried out\n\n| key | type | default here | becomes |\n|---|---|---|---|"
    every = {**training.ARGUMENTS, **training.SFT, **training.OLDER}
    for name, argument in every.items():
        if argument.fate == "honoured":
            default = value_text(training.DEFAULTS.get(name))
            ours = f"`{OTHERS[name]}`" if name in OTHERS else ""
            yield f"| `{name}` | {cell(argument_type(argument.kind))} | {default} | {ours} |"
    yield from optimizer_table()
    renamed = ", ".join(f"`{old}` is `{new}`" for old, new in training.RENAMED.items())
    yield f"\nOlder names: {renamed}."
    for fate, title in (("harmless", "No effect"), ("refused", "Refused")):
        yield f"\n### {title}\n\n| keys | why |\n|---|---|"
        reasons: dict[str, list[str]] = {}
        for name, argument in every.items():
            if argument.fate == fate:
                reasons.setdefault(argument.why or "key by key, named in the dry run", []).append(f"`{name}`")
        for why, keys in reasons.items():
            yield f"| {', '.join(keys)} | {cell(why)} |"


def optimizer_table() -> Iterator[str]:
    """Yield which values of `optim` are taken, which need a package, and which are refused and why."""
    fates: dict[str, list[str]] = {}
    for name, each in optimizers.OPTIMIZERS.items():
        package = optimizers.distribution(each)
        if each.refused:
            fate = f"refused: {each.refused} (package {package})"
        else:
            fate = f"refused unless the package {package} is installed" if package else "taken"
        fates.setdefault(fate, []).append(f"`{name}`")
    yield "\n`optim`:\n\n| values | |\n|---|---|"
    for fate, values in fates.items():
        yield f"| {', '.join(values)} | {cell(fate)} |"


def argument_type(kind: str) -> str:
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "list": "list",
             "mapping": "keys and values"}  # fmt: skip
    bare = kind.removesuffix("?")
    choices = bare.split("|")
    if len(choices) > 6:
        return f"one of {len(choices)}, such as {', '.join(choices[:4])}"
    return words.get(bare) or ", ".join(f"`{choice}`" for choice in choices)


def test_the_page_shows_what_the_code_does() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(START)[2].partition(END)[0] == tables(), (
        "python -m tests.workspace.test_settings_page"
    )


def test_every_key_of_the_sections_is_on_the_page() -> None:
    models = {
        "ModelConfig": sections.ModelConfig,
        "QuantizationConfig": sections.QuantizationConfig,
        "LoraConfig": sections.LoraSection,
        "DatasetConfig": sections.DatasetConfig,
    }
    assert {name: set(samples) for name, samples in SAMPLES.items()} == {
        name: set(model.model_fields) for name, model in models.items()
    }


def test_every_setting_of_a_table_is_reached_by_its_name() -> None:
    for name, _ in settings():
        assert list(names.resolve({name: 1})) == [name]
    for key, setting in OTHERS.items():
        found = one_key("TrainingArguments", key, {"max_length": 64, "fsdp": "full_shard"}.get(key, "true"))
        assert isinstance(found, Resolved)
        assert "TrainingArguments" in found.sources[setting], setting


def test_the_examples_above_the_tables_are_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    top = PAGE.read_text(encoding="utf-8").partition(START)[0]
    examples = [words for words in re.findall(r"`(--set .+?)`", top) if "NAME" not in words]
    assert len(examples) > 6
    for words in examples:
        command = ["tune", "phi-4-mini-instruct", "--data", "rows.jsonl", "--dry-run", *words.split()]
        assert main.run(command, {}) == 0, capsys.readouterr().err


def write() -> None:
    """Write the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    PAGE.write_text(before + START + tables() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    write()
