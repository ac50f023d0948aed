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

from runtime.tuning.output import SENTINEL, is_done
from runtime.tuning.settings import Lora, Output, TuningJob
from tests.adapters.made import make
from tests.faults.crash_points import FAIL, KILL, TERM, UNDISTURBED, Ended, Fault, Victim, digests
from tests.faults.saving import rank_in
from tests.tuning.conftest import tiny_job

COMMAND = "tests.faults.crash_points:command_line"
LLAMA = "transformers.models.llama.modeling_llama"
SAVE = "tests.faults.saving:save_adapter"
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

    def _is_tagged(self) -> bool:
        """Whether a layout that is the result has its tag, which comes after what is attached."""
        index = self.work / self.result
        return index.name != "index.json" or "v1" in [
            each["annotations"]["org.opencontainers.image.ref.name"]
            for each in json.loads(index.read_text())["manifests"]
        ]

    def has_result(self, found: dict[str, str], whole: dict[str, str]) -> bool:
        """Whether the result in `found` is that in `whole`; False where there is none."""
        below = {name: digest for name, digest in found.items() if name.startswith(self.result)}
        if not below or not self._is_tagged():
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


@pytest.fixture(scope="module")
def torch_victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    modules = ["runtime.cli.main", "runtime.merge", "tests.faults.saving", "peft", LLAMA]
    with Victim(tmp_path_factory.mktemp("victim"), modules) as process:
        yield process


@pytest.fixture(scope="module")
def merge(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    root = tmp_path_factory.mktemp("merge")
    adapter = make(tiny_llama_dir, root / "adapter")
    words = ("merge", str(adapter), f"{root}/merged/new/out", "--model", str(tiny_llama_dir))
    return Command(words, root / "merged", "new/out")


@pytest.mark.parametrize(("fault", "some"), [("killed", slice(12, None, 10)), ("full", slice(12, 13))])
def test_some_operations_at_which_a_merge_ends(
    torch_victim: Victim, merge: Command, fault: str, some: slice
) -> None:
    check(torch_victim, merge, fault, some)


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "step"), [("killed", 3), ("stopped", 6), ("full", 4), ("too_large", 9), ("broken", 9)]
)
def test_many_operations_at_which_a_merge_ends(
    torch_victim: Victim, merge: Command, fault: str, step: int
) -> None:
    check(torch_victim, merge, fault, slice(None, None, step))


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["push", "pull"])
def test_many_operations_at_which_images_end(
    victim: Victim, commands: dict[str, Command], name: str, fault: str
) -> None:
    step = {"killed": 1, "stopped": 2, "full": 2}.get(fault, 5)  # the others differ from "full" in errno
    check(victim, commands[name], fault, slice(None, None, step))


def jobs(model: Path, folder: Path) -> list[TuningJob]:
    """Two jobs for one output folder; the second may replace the first one's adapter."""
    first = tiny_job(model, folder / "rows", folder / "out", lora=Lora(r=2))
    replacing = Output(folder=folder / "out", overwrite=True)
    return [first, tiny_job(model, folder / "rows", folder / "out", lora=Lora(r=4), output=replacing)]


def check_saving(victim: Victim, model: Path, folder: Path, fault: str, some: slice) -> None:
    """Have `fault` while a job's adapter replaces an earlier one's, at `some` operations."""
    what, number, _, _ = FAULTS[fault]
    earlier, job = jobs(model, folder)
    out = job.output.folder

    def save(which: TuningJob, fault: Fault = UNDISTURBED) -> Ended:
        return victim.run(SAVE, which.model_dump_json(), below=out, fault=fault)

    assert [save(each).status for each in (earlier, job)] == [0, 0]
    whole = {name: digest for name, digest in digests(out).items() if name != SENTINEL}
    shutil.rmtree(out)
    assert save(earlier).status == 0
    shutil.copytree(out, folder / "earlier")
    operations = save(job).operations
    for at in range(1, len(operations) + 1)[some]:
        shutil.rmtree(out)
        shutil.copytree(folder / "earlier", out)
        ended = save(job, Fault(what, at, number))
        where = (fault, at, operations[at - 1], ended.text)
        if (out / SENTINEL).is_file():  # what a pusher waits for
            assert rank_in(out) == (4 if is_done(job) else 2), where
        else:
            assert not is_done(job), where
            assert not is_done(earlier), where
        assert save(job).status == 0, where
        assert is_done(job), where
        assert {name: digest for name, digest in digests(out).items() if name != SENTINEL} == whole, where


def test_some_operations_at_which_an_adapter_is_saved(
    torch_victim: Victim, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    check_saving(torch_victim, tiny_llama_dir, tmp_path, "killed", slice(22, None, 20))


@pytest.mark.long
@pytest.mark.parametrize(("fault", "step"), [("killed", 3), ("full", 7)])
def test_many_operations_at_which_an_adapter_is_saved(
    torch_victim: Victim, tiny_llama_dir: Path, tmp_path: Path, fault: str, step: int
) -> None:
    check_saving(torch_victim, tiny_llama_dir, tmp_path, fault, slice(None, None, step))
