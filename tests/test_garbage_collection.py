"""The garbage collector while libraries are imported, and at the end of a process."""

import gc
import subprocess
import sys

import pytest

from runtime import garbage_collection


def test_nothing_is_collected_while_libraries_are_imported() -> None:
    with garbage_collection.paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with pytest.raises(ImportError), garbage_collection.paused():
            raise ImportError
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("status", [0, 75])
def test_process_exits_with_its_status_after_its_exit_handlers(status: int) -> None:
    code = (
        "import atexit; from runtime import garbage_collection; atexit.register(print, 'end'); "
        f"garbage_collection.exit_without({status})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "end\n")
