"""Commands that are killed, stopped or out of disk at any operation on files: whole or absent, then the same.

Each case is one operation, one fault there, and the same command again. Few run in the normal tier, the
others in the long one.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.crash_points import FAIL, KILL, TERM, Ended, Fault, Victim, digests

COMMAND = "tests.faults.crash_points:command_line"
FAULTS = {
    "killed": (KILL, 0, -9, None),
    "stopped": (TERM, 0, 143, "error: stopped by SIGTERM"),
    "full": (FAIL, errno.ENOSPC, 6, "the disk is full"),
    "over_quota": (FAIL, errno.EDQUOT, 6, "the disk is full"),
    "too_large": (FAIL, errno.EFBIG, 6, "larger than this process may write"),
    "read_only": (FAIL, errno.EROFS, 2, "Read-only file system"),
    "broken": (FAIL, errno.EIO, 75, "the file system failed (Input/output error)"),
}
"""What happens, errno, exit status, and the one line."""


@dataclass(frozen=True)
class Command:
    """A command that writes into the folder `work`, and what of it is its result."""

    words: tuple[str, ...]
    work: Path
    result: str
    """Path below `work` that is whole or absent; "" where only the same bytes after a rerun are promised."""

    def start_over(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def has_result(self, found: dict[str, str], whole: dict[str, str]) -> bool:
        """Whether the result in `found` is that in `whole`; False where there is none."""
        below = {name: digest for name, digest in found.items() if name.startswith(self.result)}
        if not below:
            return False
        assert below == {name: digest for name, digest in whole.items() if name.startswith(self.result)}
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three files, one below another folder, as it is pushed."""
    root = tmp_path_factory.mktemp("phases")
    (root / "adapter/deep").mkdir(parents=True)
    (root / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (root / "adapter/adapter_model.safetensors").write_bytes(bytes(300_000))
    (root / "adapter/deep/notes.txt").write_text("x")
    return root


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with Victim(tmp_path_factory.mktemp("victim"), ["runtime.cli.main", "runtime.oci.layout"]) as process:
        yield process


@pytest.fixture(scope="module")
def commands(folder: Path, victim: Victim) -> dict[str, Command]:
    layout = f"oci:{folder}/layout:v1"
    assert victim.run(COMMAND, "push", str(folder / "adapter"), layout, below=folder).status == 0
    words = ("push", str(folder / "adapter"), f"oci:{folder}/pushed/layout:v1")
    return {
        "push": Command(words, folder / "pushed", "layout/index.json"),
        "pull": Command(("pull", layout, f"{folder}/pulled/new/out"), folder / "pulled", "new/out"),
    }


def check(victim: Victim, command: Command, fault: str, some: slice) -> None:
    """Have `fault` at `some` of the operations of `command`, each from the start, and rerun it."""
    what, number, status, line = FAULTS[fault]
    command.start_over()
    undisturbed = victim.run(COMMAND, *command.words, below=command.work)
    assert undisturbed.status == 0, undisturbed.text
    whole = digests(command.work)
    for at in range(1, len(undisturbed.operations) + 1)[some]:
        command.start_over()
        ended = victim.run(COMMAND, *command.words, below=command.work, fault=Fault(what, at, number))
        where = (fault, at, undisturbed.operations[at - 1], ended.text)
        left = digests(command.work)
        if ended.status == 0:  # what failed was the removal of scratch files, or came after the end
            assert command.has_result(left, whole), where
        else:
            assert ended.status == status, where
            command.has_result(left, whole)
            assert line is None or one_line(ended, line), where
        again = victim.run(COMMAND, *command.words, below=command.work)
        assert again.status == 0, (where, again.text)
        assert digests(command.work) == whole, where


def one_line(ended: Ended, said: str) -> bool:
    """Whether what people read is one line, with `said` in it."""
    return len(ended.lines) == 1 and said in ended.lines[0]


@pytest.mark.parametrize("fault", ["killed", "stopped", "full"])
@pytest.mark.parametrize("name", ["push", "pull"])
def test_some_operations_at_which_images_end(
    victim: Victim, commands: dict[str, Command], name: str, fault: str
) -> None:
    check(victim, commands[name], fault, slice(4, None, 12))


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["push", "pull"])
def test_every_operation_at_which_images_end(
    victim: Victim, commands: dict[str, Command], name: str, fault: str
) -> None:
    often = fault in {"killed", "stopped", "full"}  # the others differ from "full" in their errno alone
    check(victim, commands[name], fault, slice(None, None, 1 if often else 4))
