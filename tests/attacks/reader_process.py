"""Reads data files, each in a process of its own, and prints what became of it and of its memory.

Run as `python -m tests.attacks.reader_process MAX_BYTES POLICY FILE …`; prints a line of JSON a file. The
processes are forked, so that modules are imported once. With `-` for the files their names come by standard
input, and this process reads them all.
"""

import json
import os
import sys
import time
from pathlib import Path

import pyarrow.ipc
import pyarrow.parquet  # noqa: F401 - so that its memory is not the file's

from runtime import hardware
from runtime.errors import Failure
from runtime.tuning.data import dataset
from runtime.tuning.settings import DataSource


def read(file: Path, max_bytes: int, policy: str) -> dict[str, object]:
    before, began = hardware.status_bytes("VmRSS"), time.monotonic()
    outcome, text = "read", ""
    try:
        data = dataset.load(DataSource(file=file, max_bytes=max_bytes, on_bad_row=policy))
        text = f"{len(data.examples)} examples"
    except Failure as failure:
        outcome, text = type(failure).__name__, str(failure)
    except BaseException as error:
        outcome, text = f"uncaught {type(error).__name__}", str(error)
    grown = hardware.peak_resident_bytes() - before
    return {"outcome": outcome, "text": text, "grown": grown, "seconds": time.monotonic() - began}


def main() -> None:
    max_bytes, policy, *files = sys.argv[1:]
    if files == ["-"]:
        for line in sys.stdin:
            print(json.dumps(read(Path(line[:-1]), int(max_bytes), policy)), flush=True)
        return
    for file in map(Path, files):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, json.dumps(read(file, int(max_bytes), policy)).encode()[:60_000])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        os.close(writing)
        result = os.read(reading, 65_536)
        os.close(reading)
        crashed = {"outcome": f"ended with status {status}", "text": "", "grown": 0, "seconds": 0}
        print(json.dumps({"file": file.name, **(json.loads(result) if result else crashed)}), flush=True)


if __name__ == "__main__":
    main()
