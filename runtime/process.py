"""How a process starts and ends without Python's garbage collector in the way.

torch, transformers and peft make half a million objects when they are imported, and none of them is
garbage. Start at `importing` and `leave`.
"""

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import NoReturn


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Within: nothing is collected, which makes imports and loading a fifth faster. Afterwards it stays.

    For what makes little garbage: that, too, stays.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def leave(status: int) -> NoReturn:
    """End the process with `status`; exit handlers run.

    An interpreter that ends looks for garbage among all that was imported: up to 5 s, of a pod's last ones.
    """
    gc.freeze()
    sys.exit(status)
