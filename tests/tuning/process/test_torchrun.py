"""What our torchrun makes of its arguments."""

from torch.distributed import run

from runtime.tuning.process.torchrun import GRACE_OPTION, known_to

ARGUMENTS = ["--nproc-per-node", "1", GRACE_OPTION, "27", "-m", "runtime.tuning", "job.json"]


def test_this_torch_is_told_the_grace_period() -> None:
    usage = run.get_args_parser().format_help()
    options = run.parse_args(known_to(usage, ARGUMENTS))  # type: ignore[no-untyped-call]
    assert options.shutdown_timeout == 27


def test_a_torch_without_a_grace_period_is_not_told_one() -> None:
    kept = known_to("usage: torchrun [--nproc-per-node N] training_script ...", ARGUMENTS)
    assert kept == ["--nproc-per-node", "1", "-m", "runtime.tuning", "job.json"]
