"""FSDP2 on two gloo processes: the base sharded, and the very adapter that DDP makes."""

import json
import signal
from collections.abc import Callable

import pytest

from runtime.tuning.output import OutputPaths
from runtime.tuning.settings import Encoding, Lora, TuningJob
from runtime.tuning.train.checkpoints import listed
from tests.tuning.conftest import Worker

pytestmark = pytest.mark.slow

Maker = Callable[..., TuningJob]

SHAPE = {
    "training": {
        "max_steps": 16, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3,
        "save_strategy": "steps", "save_steps": 5, "gradient_checkpointing": True,
    },
    "encoding": Encoding(max_tokens=160),
    "lora": Lora(r=4, alpha=8, dropout=0.0),
}  # fmt: skip
"""Steps of 6 rows in passes of 160 tokens: the ranks often differ in how many passes they need.

Without dropout, whose random numbers the sharded ranks' additional passes use up too.
"""


def test_sharded_qlora_ends_with_the_bytes_of_ddp_and_goes_on_from_its_checkpoints(make_job: Maker) -> None:
    whole = Worker(make_job("ddp", **SHAPE), processes=2)
    assert whole.wait() == 0, whole.output()

    job = make_job("fsdp", **SHAPE, parallel="fsdp")
    first = Worker(job, processes=2)
    first.wait_for_step(8)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 1  # torchrun's own status
    assert first.failure()["code"] == 143, first.output()
    stopped = listed(OutputPaths(job.output.folder).checkpoints)[-1]
    assert {path.name for path in stopped.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.pt",
        "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "trainer_state.json", "training_args.bin",
    }  # fmt: skip

    second = Worker(job, processes=2)
    assert second.wait() == 0, second.output()
    assert f"resuming from {stopped.name}" in second.output()
    assert "base model sharded: 0.1 of 0.2 MiB on each of 2 ranks" in second.output()
    assert second.adapter() == whole.adapter()
    assert [step["loss"] for step in second.steps()][-3:] == [step["loss"] for step in whole.steps()][-3:]
    one, two = (json.loads(worker.paths.report.read_text())["result"] for worker in (whole, second))
    assert two["held_out_loss"] == one["held_out_loss"]
    assert two["samples"] == one["samples"]
