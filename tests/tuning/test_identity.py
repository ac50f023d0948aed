"""Which settings make another job: a table over all of them, so that a new one must be classified."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel

from runtime.config import Strict
from runtime.model_source import ModelSource
from runtime.tuning import identity
from runtime.tuning.arguments.training import ARGUMENTS
from runtime.tuning.data.tokenize import TokenizedData, TokenizedSequence, TokenizedSplit
from runtime.tuning.identity import JobIdentity
from runtime.tuning.settings import DataSource, Encoding, Output, TuningJob

Maker = Callable[..., TuningJob]

URL = "https://user:pw@acct.blob.core.windows.net/d/rows.parquet?sv=2024&sig=AAA"


def setting_names(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Return the dotted names of all settings in `model`, but for training arguments."""
    names = set()
    for name, field in model.model_fields.items():
        nested = [
            kind
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, Strict)
        ]
        names |= setting_names(nested[0], f"{prefix}{name}.") if nested else {f"{prefix}{name}"}
    return names - {"training"}


def test_every_setting_is_in_one_of_the_two_tables() -> None:
    for name in setting_names(TuningJob):
        groups = {name, name.partition(".")[0]}
        assert bool(groups & identity.DECISIVE) != bool(groups & identity.WITHOUT_EFFECT), name
    known = {part for name in setting_names(TuningJob) for part in (name, name.partition(".")[0])}
    assert known >= identity.DECISIVE | identity.WITHOUT_EFFECT


def test_every_training_argument_that_is_honoured_is_in_one_of_the_two_tables() -> None:
    honoured = {name for name, argument in ARGUMENTS.items() if argument.fate == "honoured"}
    assert not identity.DECISIVE_TRAINING & identity.TRAINING_WITHOUT_EFFECT
    assert honoured == identity.DECISIVE_TRAINING | identity.TRAINING_WITHOUT_EFFECT


@pytest.mark.parametrize("name", sorted(identity.TRAINING_WITHOUT_EFFECT))
def test_what_is_only_logged_or_saved_makes_no_other_job(make_job: Maker, name: str) -> None:
    assert identity.requested(make_job(training={name: 5})) == identity.requested(make_job())


@pytest.mark.parametrize("name", sorted(identity.DECISIVE_TRAINING))
def test_what_changes_the_weights_makes_another_job(make_job: Maker, name: str) -> None:
    best = {"load_best_model_at_end": True} if name != "load_best_model_at_end" else {}
    plain = identity.requested(make_job(training=best))
    value = "linear" if name == "lr_scheduler_type" else 7
    other = identity.requested(make_job(training={**best, name: value}))
    assert other.digest != plain.digest
    (difference,) = other.differences(plain)
    assert difference.startswith(name)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "other", "metrics_port": 5001, "checkpoint_minutes": 1.0, "sources": {"lora.r": "flag"}},
        {"fit": "adapt", "parallel": "fsdp", "tokens_per_pass": 512},
        {"training": {"eval_strategy": "steps", "eval_steps": 3}},
        {"training": {"learning_rate": None, "label_smoothing_factor": None}},
    ],
    ids=["names", "memory", "evaluations", "absent"],
)
def test_settings_without_effect_make_no_other_job(make_job: Maker, settings: dict[str, Any]) -> None:
    training = {"learning_rate": None, **settings.pop("training", {})}
    plain = make_job(training={"learning_rate": None})
    assert identity.requested(make_job(training=training, **settings)) == identity.requested(plain)


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"training": {"learning_rate": 1e-3}}, "learning_rate 0.01, now 0.001"),
        ({"encoding": Encoding(max_tokens=64)}, "encoding.max_tokens null, now 64"),
        ({"method": "lora", "quantization": None}, 'method "qlora", now "lora"'),
    ],
)
def test_difference_is_named_with_both_values(
    make_job: Maker, settings: dict[str, Any], difference: str
) -> None:
    other = identity.requested(make_job(**settings))
    assert difference in other.differences(identity.requested(make_job()))


def test_evaluations_make_another_job_where_they_decide_the_learning_rate(make_job: Maker) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    few = identity.requested(make_job(training={**plateau, "eval_steps": 5}))
    many = identity.requested(make_job(training={**plateau, "eval_steps": 2}))
    assert many.differences(few) == ("eval_steps 5, now 2",)


def with_url(make_job: Maker, url: str) -> JobIdentity:
    return identity.requested(make_job(data=DataSource(urls=(url,))))


def test_signature_of_an_address_makes_no_other_job_and_is_not_recorded(make_job: Maker) -> None:
    first, renewed = with_url(make_job, URL), with_url(make_job, URL.replace("AAA", "BBB"))
    assert renewed == first
    assert not any(secret in first.to_json() for secret in ("AAA", "user", "pw", "sv="))
    moved = with_url(make_job, URL.replace("rows", "others"))
    assert moved.differences(first) == ("the data's address",)


def test_data_counts_by_its_digest_wherever_it_lies(make_job: Maker, tmp_path: Path, rows_dir: Path) -> None:
    first = identity.requested(make_job())
    copy = tmp_path / "copy.parquet"
    copy.write_bytes((rows_dir / "rows.parquet").read_bytes())
    same = identity.requested(make_job(data=DataSource(file=copy)))
    assert same.digest == first.digest
    copy.write_bytes(copy.read_bytes() + b" ")
    changed = identity.requested(make_job(data=DataSource(file=copy)))
    assert changed.differences(first) == ("the data",)
    copy.unlink()
    assert not identity.requested(make_job(data=DataSource(file=copy))).differences(first)  # gone: not known


@pytest.mark.parametrize("size", [1000, 12 << 20], ids=["small", "large"])
def test_base_model_counts_by_its_content(tmp_path: Path, make_job: Maker, size: int) -> None:
    folder, weights = tmp_path / "model", np.arange(size, dtype=np.uint8)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("read me")

    def with_weights(**where: Any) -> JobIdentity:
        (folder / "model.safetensors").write_bytes(weights.tobytes())
        return identity.requested(make_job(model=ModelSource(**{"name": "m", "path": folder, **where})))

    first = with_weights()
    (folder / "README.md").unlink()
    assert with_weights(name=str(folder), path=None) == first
    weights[-1] ^= 1
    assert with_weights().differences(first) == ("the base model's files",)


def test_rows_that_are_encoded_otherwise_are_another_jobs() -> None:
    def split(*mask: bool) -> TokenizedSplit:
        row = TokenizedSequence(np.arange(3, dtype=np.int32), np.array(mask))
        return TokenizedSplit(TokenizedData((row,)))

    first, same, other = (
        JobIdentity({}, files=("a",), rows=identity.rows_digest(split(False, True, last)))
        for last in (True, True, False)
    )
    assert same == first
    assert other.digest != first.digest
    assert "how the rows are encoded" in other.differences(first)[0]


def test_processes_count_where_the_rows_of_a_step_depend_on_them() -> None:
    two, four = JobIdentity({}, processes=2), JobIdentity({}, processes=4)
    assert four.differences(two) == ("processes 2, now 4",)


def test_record_is_read_back_as_it_was_written_and_anything_else_is_none(
    make_job: Maker, tmp_path: Path
) -> None:
    known, record = identity.requested(make_job(output=Output())), tmp_path / "finished.json"
    assert JobIdentity.read(record) is None
    record.write_text(known.to_json())
    assert JobIdentity.read(record) == known
    for text in ("", "[]", "{}", "a1b2", known.to_json()[:-5], known.to_json().replace("settings", "s")):
        record.write_text(text)
        assert JobIdentity.read(record) is None
