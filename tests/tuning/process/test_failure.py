"""Why a job ended: from its workers' records to an exit code and a termination message."""

import errno
import json
from pathlib import Path

import pytest

from runtime.errors import CapacityError, DataError, DivergedError, Failure, StoppedError, exit_code
from runtime.tuning.process import failure


def recorded(folder: Path, *failures: tuple[int, Failure]) -> list[dict[str, object]]:
    for rank, error in failures:
        failure.write_record(folder / f"failure-{rank}.json", error, "train", 7)
    return failure.read_records(sorted(folder.glob("failure-*.json")))


def test_first_reason_counts_and_those_torchrun_stopped_do_not(tmp_path: Path) -> None:
    entries = recorded(
        tmp_path, (0, StoppedError("stopped")), (1, DivergedError("NaN")), (2, Failure("peer lost"))
    )
    entry = failure.combine(entries, stop_requested=False, status=1)
    found = failure.from_record(entry)
    assert (type(found), str(found), exit_code(found), entry["step"]) == (DivergedError, "NaN", 4, 7)


def test_requested_stop_is_143_though_a_rank_lost_its_peer(tmp_path: Path) -> None:
    entries = recorded(
        tmp_path, (0, Failure("connection closed by peer")), (1, StoppedError("stopped after step 7"))
    )
    assert failure.combine(entries, stop_requested=True, status=1)["code"] == 143
    assert failure.combine([], stop_requested=True, status=1)["code"] == 143


def test_a_real_reason_beats_the_request_to_stop(tmp_path: Path) -> None:
    entries = recorded(tmp_path, (0, CapacityError("no space left")), (1, StoppedError("stopped")))
    assert failure.combine(entries, stop_requested=True, status=1)["code"] == 6


def test_worker_without_a_failure_record_is_reported() -> None:
    entry = failure.combine([], stop_requested=False, status=1)
    assert entry["code"] == 1
    assert "ended without a failure record" in str(entry["message"])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("x"), DataError),
        (OSError(errno.ENOSPC, "No space left on device", "/mnt/results/x"), CapacityError),
        (MemoryError(), CapacityError),
        (ZeroDivisionError("oops\nsecond line"), Failure),
    ],
)
def test_errors_of_others_become_ours(error: BaseException, kind: type[Failure]) -> None:
    found = failure.as_failure(error)
    assert type(found) is kind
    assert "\n" not in str(found)


def test_fault_27_cuda_out_of_memory_gives_advice() -> None:
    import torch

    found = failure.as_failure(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert exit_code(found) == 6
    assert "lower max_length or per_device_train_batch_size" in str(found)


def test_fault_56_records_hold_no_secrets(tmp_path: Path) -> None:
    written = tmp_path / "termination-log"
    written.touch()
    error = DataError("https://u:passw0rd@h/a.parquet?sig=topsecret: answered 403 to hf_abcdefghijkl")
    entries = recorded(tmp_path, (0, error))
    failure.write_termination_log(entries[0], written)
    for path in tmp_path.iterdir():
        for secret in ("passw0rd", "hf_abcdefghijkl"):
            assert secret not in path.read_text()
        assert "topsecret" not in path.read_text()
    line = json.loads(written.read_text())
    assert line.keys() == {"phase", "code", "message", "step", "retriable"}


def test_termination_log_is_not_made_where_there_is_none(tmp_path: Path) -> None:
    failure.write_termination_log(failure.describe(Failure("x"), "train", 0), tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
