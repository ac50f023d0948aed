"""Which number type a job computes in on the hardware that is there.

A manifest says bfloat16 (KAITO's default template does) and the GPU may be a V100: the job is computed in
the type that works, with a warning. Does not know models. Start at `resolve_precision`.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from runtime.hardware import Hardware, compute_dtype
from runtime.model_source import Dtype
from runtime.tuning.settings import TuningJob

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Precision:
    """The compute type, and the flags of TrainingArguments for it."""

    dtype: Dtype

    @property
    def bf16(self) -> bool:
        return self.dtype == "bfloat16"

    @property
    def fp16(self) -> bool:
        """float16 compute with a loss scaler; adapter weights stay float32."""
        return self.dtype == "float16"


def choose_dtype(job: TuningJob, hardware: Hardware) -> Literal["float32", "float16", "bfloat16"]:
    """Return the type that `job` is computed in on `hardware`, by the rule of `resolve_precision`."""
    wanted = _wanted(job)
    if wanted == "float32" or (wanted == "float16" and hardware.kind == "cuda"):
        return wanted
    return compute_dtype(hardware)


def _wanted(job: TuningJob) -> Dtype:
    if job.training.get("bf16"):
        return "bfloat16"
    return "float16" if job.training.get("fp16") else job.model.dtype


def resolve_precision(job: TuningJob, hardware: Hardware) -> tuple[TuningJob, Precision]:
    """Return `job` with types that `hardware` computes natively, and that type.

    float32 stays when requested; bfloat16 and float16 become the hardware's own choice where they would
    be emulated (bfloat16 on a CPU is about ten times slower than float32, on a V100 it fails).
    """
    wanted, chosen = _wanted(job), choose_dtype(job, hardware)
    if wanted not in ("auto", chosen):
        log.warning("%s is not native to %s: computing in %s instead", wanted, hardware.name, chosen)
    model = job.model.model_copy(update={"dtype": chosen})
    quantization = job.quantization and job.quantization.model_copy(update={"compute_dtype": chosen})
    training = {key: value for key, value in job.training.items() if key not in ("bf16", "fp16")}
    resolved = job.model_copy(update={"model": model, "quantization": quantization, "training": training})
    return resolved, Precision(chosen)
