"""`metrics_server.py`: started by controllers beside training, and leaves the port to the job itself.

The job answers GET /metrics and /health there (runtime/tuning/report/metrics_server.py), with the figures of
this server's JSON among its own; two processes cannot share a port. Start at `main`.
"""

import logging
from collections.abc import Mapping

from runtime import logs

log = logging.getLogger(__name__)


def main(environ: Mapping[str, str]) -> int:
    """Say who answers, and end well."""
    logs.configure(debug=environ.get("DEBUG_MODE", "").lower() == "true")
    log.info("the training process itself answers /metrics and /health, from its start on")
    return 0
