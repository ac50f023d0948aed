"""How a pod's process ends: one log line, the exit status of errors.py, the reason in the termination log.

Does not know what the process does. Start at `exit_status_of`.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from runtime.errors import Failure, exit_code
from runtime.tuning.process import failure

log = logging.getLogger(__name__)


def exit_status_of(work: Callable[[], None], *, phase: str, termination_log: Path) -> int:
    """Run `work` and return the process's exit status.

    What `work` itself has written to `termination_log` stays: it knows its phase better. Exceptions that are
    no Failure pass through: their traceback is what helps.
    """
    try:
        work()
    except Failure as reason:
        log.error("%s", reason)  # noqa: TRY400 - one line: the failure's text is complete
        failure.write_termination_log_once(failure.describe(reason, phase, 0), termination_log)
        return exit_code(reason)
    return 0
