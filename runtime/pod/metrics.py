"""`metrics_server.py`: started by controllers beside training; leaves the port to the job itself.

The job answers GET /metrics and /health there (runtime/tuning/report/metrics_server.py), including the JSON
figures of KAITO's own metrics server; two processes cannot share a port. Start at `main`.
"""

import logging
from collections.abc import Mapping

from runtime import logs

log = logging.getLogger(__name__)


def main(environ: Mapping[str, str]) -> int:
    """Log which process answers, and exit with 0."""
    logs.configure(debug=environ.get("DEBUG_MODE", "").lower() == "true")
    log.info("the training process itself answers /metrics and /health, from its start on")
    return 0
