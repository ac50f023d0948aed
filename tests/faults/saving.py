"""What a job does last, without its training: for processes that are killed there."""

import json
from pathlib import Path

from runtime import adapters
from runtime.tuning import identity, output
from runtime.tuning.settings import TuningJob


def save_adapter(job_text: str) -> None:
    """Save an adapter and a report as `job` does when it is trained; the weights follow from its rank."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    job = TuningJob.model_validate_json(job_text)
    assert job.model.path is not None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(str(job.model.path))
    tuned = get_peft_model(model, LoraConfig(r=job.lora.r, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    output.check_replaceable(job)
    output.OutputPaths(job.output.folder).make_work()
    with output.replacing(job, identity.requested(job)) as scratch:
        adapters.save(tuned, scratch, source=job.model)
        (scratch / "tuning_report.json").write_text(json.dumps({"rank": job.lora.r}))


def rank_in(folder: Path) -> int | None:
    """Return the rank of the adapter in a folder, if all its files are of one job; None without one."""
    names = ("adapter_config.json", "tuning_report.json")
    if not all((folder / name).is_file() for name in (*names, adapters.WEIGHTS_FILE)):
        return None
    config, report = (json.loads((folder / name).read_text()) for name in names)
    ranks = {config["r"], report["rank"], adapters.check(folder).rank}
    return ranks.pop() if len(ranks) == 1 else None
