"""Ranks from torchrun's variables, and collectives of a single process."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import ConfigError, DataError
from runtime.tuning.process.ranks import Ranks


def test_ranks_come_from_torchruns_variables() -> None:
    environ = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    ranks = Ranks.read(environ)
    assert ranks == Ranks(5, 1, 8, 4)
    assert not ranks.is_main
    assert not ranks.is_local_main
    assert Ranks.read({}) == Ranks()
    assert Ranks().is_main


def test_rank_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ConfigError, match="must be whole numbers"):
        Ranks.read({"RANK": "first"})


def test_collectives_of_a_single_process_return_its_own_values() -> None:
    import torch

    ranks = Ranks()
    ranks.init_process_group("cpu")
    assert not torch.distributed.is_initialized()
    ranks.barrier()
    assert ranks.broadcast("value") == "value"
    assert ranks.gather("value") == ["value"]
    assert ranks.all_reduce_max(3, "cpu") == 3
    assert ranks.all_reduce_sum(torch.tensor([1, 2])).tolist() == [1, 2]
    ranks.destroy_process_group()


FAILING = """
import os, sys
from torch import distributed
from runtime.errors import DataError, exit_code
from runtime.tuning.process.ranks import Ranks

ranks = Ranks(rank=int(sys.argv[1]), local_rank=int(sys.argv[1]), world_size=2, local_world_size=2)
distributed.init_process_group("gloo", init_method=sys.argv[2], rank=ranks.rank, world_size=2)
with ranks.together():
    pass
try:
    with ranks.together():
        if ranks.is_local_main:
            raise DataError("row 7")
except Exception as error:
    print(error)
    sys.stdout.flush()
    os._exit(exit_code(error))
"""


def test_all_ranks_end_with_the_failure_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FAILING]
    ends = [
        subprocess.Popen([*command, str(rank), f"file://{tmp_path}/store"], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    assert [(end.communicate(timeout=120)[0], end.returncode) for end in ends] == [("row 7\n", 3)] * 2
    with pytest.raises(DataError, match="alone"), Ranks().together():
        raise DataError("alone")


@pytest.mark.parametrize(("rank", "local", "expected"), [(0, 0, 3), (1, 1, 2), (8, 0, 3), (9, 1, 2)])
def test_one_process_of_each_node_warns_of_what_all_see(
    rank: int, local: int, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    log = logging.getLogger("runtime.tuning.data.folder")
    with Ranks(rank, local, 16, 8).said_once():
        log.warning("a bad row")
        log.error("an error")
    log.warning("of this rank alone")
    assert len(caplog.messages) == expected
