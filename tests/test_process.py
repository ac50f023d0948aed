"""The collector while libraries are imported, and the end of a process."""

import gc
import subprocess
import sys

import pytest

from runtime import process


def test_nothing_is_collected_while_libraries_are_imported() -> None:
    with process.importing():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with pytest.raises(ImportError), process.importing():
            raise ImportError
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("status", [0, 75])
def test_process_leaves_with_its_status_after_its_exit_handlers(status: int) -> None:
    code = (
        f"import atexit; from runtime import process; atexit.register(print, 'end'); process.leave({status})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "end\n")
