"""The report of a run: its results as JSON, and the page that people open, in a real browser."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import DataError
from runtime.hardware import Hardware
from runtime.model_source import ModelSource
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.dataset import DataFile, Dataset
from runtime.tuning.data.example import Example
from runtime.tuning.data.tokenize import TokenizedData, TokenizedSequence, TokenizedSplit
from runtime.tuning.report import html, report
from runtime.tuning.report.report import Sample
from runtime.tuning.settings import DataSource, Lora, Output, TuningJob
from tests.browser import Browser, browser

NASTY = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
SECRET = "sig=ab%2Fsecret"
ROW = TokenizedSequence(np.arange(40, dtype=np.int32), np.arange(40) > 30)


def job(**given: Any) -> TuningJob:
    values: dict[str, Any] = {
        "name": "workspace-tuning-phi-3",
        "model": ModelSource(name="phi-3-mini-4k-instruct", repository="microsoft/Phi-3", revision="a" * 40),
        "data": DataSource(urls=(f"https://store.example/rows.parquet?{SECRET}",), folder=Path("/mnt/data")),
        "training": {"learning_rate": 2e-4, "seed": 42, "num_train_epochs": 3.0},
        "sources": {"training.learning_rate": "preset phi-3-mini", "method": "job.yaml tuning.method"},
        "output": Output(),
    }
    return TuningJob(**{**values, **given})


MEASURED = ((0, 2.61), (120, 1.34), (240, 1.21), (360, 1.19))


def build(
    *,
    measured: tuple[tuple[float, float], ...] = MEASURED,
    kept_step: int = 360,
    epochs: float = 3.0,
    **given: Any,
) -> dict[str, Any]:
    losses = tuple(
        (step, 1.1 + 1.4 * math.exp(-step / 60) + 0.12 * math.sin(step * 1.7) * math.cos(step / 3))
        for step in range(1, 361)
    )
    outcome = report.Outcome(
        steps=360,
        kept_step=kept_step,
        epochs=epochs,
        train_loss=1.093,
        losses=losses,
        held_out_losses=measured,
        samples=tuple(
            Sample(f"{NASTY} Question {n}?", "It is so because it must be.", "I do not know.", "It is so.")
            for n in range(1, 6)
        ),
        seconds=3725,
        tokens_per_s=1843.2,
        peak_memory_bytes=9 * 2**30,
        planned_memory_bytes=10 * 2**30,
        machine=report.Machine(Hardware("cuda", "Tesla V100-PCIE-16GB", (7, 0), 16 * 2**30, 1), 1, "float16"),
    )
    files = (DataFile("train-00000-of-00001.parquet", 5048, "5" * 64), DataFile(NASTY, 12, "6" * 64))
    bad_rows = BadRows("skip")
    for row in range(3):
        bad_rows.add(DataError("is empty"), f"row {row}")
    data = Dataset((Example((), text="x"),) * 5060, files, bad_rows).summary()
    tokenized = TokenizedData((ROW,) * 100, (1,) * 60 + (2,) * 20, truncated=4, too_long=2, unlabelled=1)
    found = report.build(
        job(**given), data, TokenizedSplit(tokenized, tokenized if measured else None), outcome
    )
    return {**found, "adapter_sha256": "7" * 64}


class Reader(HTMLParser):
    """Collects what a page refers to and shows."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.text = " ".join(reader.text.split())
    return reader


def test_page_is_one_file_without_scripts_or_requests() -> None:
    text = html.render(build())
    reader = read(text)
    assert not {"script", "iframe", "object", "img"} & reader.tags
    assert reader.links == ["data:,"]
    assert "http" not in re.sub(r"http-equiv|https://store\.example/rows\.parquet", "", text)
    assert "default-src 'none'" in text


def test_report_of_a_run_that_keeps_its_best_step_names_it_and_its_loss() -> None:
    made = build(kept_step=240)
    assert made["result"]["kept_step"] == 240
    assert made["result"]["held_out_loss"] == {"before": 2.61, "after": 1.21}
    text = read(html.render(made)).text
    assert "360 steps, step 240 kept, in 1:02:05" in text
    assert "2.610 → 1.210" in text


def test_page_shows_what_the_report_holds() -> None:
    text = read(html.render(build())).text
    for part in (
        "workspace-tuning-phi-3", "QLoRA on phi-3-mini-4k-instruct", "360 steps in 1:02:05",
        "1 × Tesla V100-PCIE-16GB", "2.610 → 1.190", "−54 %", "13.60 → 3.29", "1,843",
        "9.0 GiB 10.0 GiB planned, of 16.0 GiB",
        "5,060 read: 80 trained on (as 100 sequences), 80 held out, 3 skipped as bad (3: is empty)",
        "4,000 an epoch, 900 of them trained (22 %)",
        "4 cut at", "2 dropped as too long, 1 dropped without a trained token", "a" * 40, "5" * 64, "7" * 64,
        "training 42, shuffle and split 42", "learning_rate 0.0002 preset phi-3-mini", "float16", "torch 2.",
        "Before I do not know.", "After It is so.", "In the data It is so because it must be.",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("Question ") == 5


def test_report_and_page_hold_no_secret_and_no_path() -> None:
    found = build(output=Output(credentials=Path("/root/.docker/config.json")))
    text = json.dumps(found) + html.render(found)
    assert "store.example/rows.parquet" in text
    assert SECRET not in text
    assert "/root" not in text
    assert "/mnt/data" not in text
    assert json.loads(json.dumps(found, allow_nan=False)) is not None


def test_name_of_the_run_and_verdict_are_in_report_and_page() -> None:
    found = build(run="tickets-20261130-1132")
    assert (found["run"], found["job"]) == ("tickets-20261130-1132", "workspace-tuning-phi-3")
    assert found["verdict"] == {
        "kind": "learnt",
        "text": "learnt: the held-out loss fell by 54% and is level",
    }
    text = read(html.render(found)).text
    assert "Tuning report tickets-20261130-1132 QLoRA" in text
    assert found["verdict"]["text"].capitalize() in text
    rose = read(html.render(build(measured=((0, 2.61), (120, 1.34), (240, 1.212), (360, 1.31))))).text
    assert "Overfit from step 240 on, where the held-out loss was lowest (1.212)" in rose


def test_page_of_an_adapter_that_is_not_served_says_what_to_do() -> None:
    text = read(html.render(build(lora=Lora(options={"modules_to_save": ["lm_head"]})))).text
    assert "This adapter cannot be served as it is (modules_to_save: it trains whole modules)" in text
    assert "runtime merge makes a model of it that is served" in text
    assert "cannot be served" not in read(html.render(build())).text


def test_page_of_a_short_run_claims_no_epoch_and_no_change() -> None:
    text = read(html.render(build(measured=((0, 6.256), (360, 6.255)), epochs=0.11))).text
    assert "over the whole run" in text
    assert "last epoch" not in text
    assert "521 →" in text
    assert "hardly changed" in text
    assert "Nothing learnt: " in text
    assert "over the last epoch" in read(html.render(build())).text


def test_run_without_held_out_rows_says_what_is_missing() -> None:
    found = build(measured=())
    text = read(html.render(found)).text
    assert "No rows were held out" in text
    assert "Questions from the training rows" in text
    assert "Held-out loss" not in text


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.mark.system
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="apt-get install chromium chromium-driver")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_shows_the_page_without_errors(
    window: Browser, tmp_path: Path, scheme: str, width: int
) -> None:
    file = tmp_path / "report.html"
    file.write_text(html.render(build()), encoding="utf-8")
    window.resize(width, 900)
    window.scheme(scheme)
    window.open(file.as_uri())
    assert window.complaints() == []
    assert window.run("return document.title") == "workspace-tuning-phi-3: tuning report"
    assert window.run("return document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
    ground = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", ground)[:3]) > 380) == (scheme == "light")
    box = "const b = document.querySelector('svg path.train').getBoundingClientRect(); return b.width"
    assert window.run(box) > width * 0.5
    contrast = window.run("return getComputedStyle(document.querySelector('svg path.train')).stroke")
    assert contrast != ground
