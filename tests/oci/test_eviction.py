"""A spot node vanishes with its disk: the job goes on elsewhere from the registry, to the same bytes."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from runtime import oci
from runtime.errors import RegistryError
from runtime.oci import checkpoints
from tests.oci.conftest import Started, fresh, quick

pytestmark = [pytest.mark.system, pytest.mark.slow]


TURNS = [("user", "what is {n}?"), ("assistant", "it is {n}, {n} and {n}, as everybody knows")]


def rows(path: Path) -> Path:
    text = [
        {"messages": [{"role": role, "content": words.format(n=n)} for role, words in TURNS]}
        for n in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in text))
    return path


def tune(model: Path, data: Path, output: Path, *flags: str) -> "subprocess.Popen[bytes]":
    settings = [
        "TrainingArguments.num_train_epochs=2",
        "TrainingArguments.per_device_train_batch_size=2",
        "TrainingArguments.gradient_accumulation_steps=1",
        "TrainingArguments.save_strategy=steps",
        "TrainingArguments.save_steps=15",
        "lora.r=4",
        "method=lora",
    ]
    command = [
        sys.executable,
        "-m",
        "runtime",
        "tune",
        str(model),
        "--data",
        str(data),
        "--output",
        str(output),
    ]
    command += [part for setting in settings for part in ("--set", setting)]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*command, *flags], stdout=log, stderr=log)


def pull_the_plug(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and all its descendants at once, as a vanishing node does."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in tree:
        each.suspend()
    for each in reversed(tree):
        each.kill()
    process.wait()


def test_evicted_run_ends_with_the_bytes_of_the_uninterrupted_one(
    open_registry: Started, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    data = rows(tmp_path / "rows.jsonl")
    whole = tmp_path / "whole"
    uninterrupted = tune(tiny_llama_dir, data, whole)

    image = oci.parse(checkpoints.beside(str(fresh(open_registry.host, "adapter"))))
    first_node = tmp_path / "first-node"
    first = tune(tiny_llama_dir, data, first_node, "--checkpoint-image", str(image))
    deadline = time.monotonic() + 180
    while oci_step(image) is None:
        assert first.poll() is None, first_node.with_suffix(".log").read_text()
        assert time.monotonic() < deadline, f"no checkpoint in {image}"
        time.sleep(0.1)
    pull_the_plug(first)
    shutil.rmtree(first_node)

    second_node = tmp_path / "second-node"
    second = tune(tiny_llama_dir, data, second_node, "--checkpoint-image", str(image))
    assert second.wait(300) == 0, second_node.with_suffix(".log").read_text()
    assert uninterrupted.wait(300) == 0, whole.with_suffix(".log").read_text()

    log = second_node.with_suffix(".log").read_text()
    assert "restored step" in log
    assert "resuming from checkpoint-" in log
    name = "adapter_model.safetensors"
    assert (second_node / name).read_bytes() == (whole / name).read_bytes()
    assert oci_step(image) is None  # removed after success


def oci_step(image: oci.Reference) -> str | None:
    try:
        return oci.inspect(image, quick()).manifest.annotations["sh.kaito.tuning.checkpoint.step"]
    except RegistryError:
        return None
