"""Exec probes of multi-node vLLM pods; the startup probe is benchmark.py.

A client of the server, it does not know the engine. Start at `node_health`.
"""

from collections.abc import Sequence

import httpx

from runtime import ports
from runtime.pod import flags


def node_health(arguments: Sequence[str]) -> int:
    """Run `liveness|readiness --leader-address=… [--vllm-port=…]`; return 0 where the server passes."""
    options = flags.read(arguments)
    host, port = options.get("leader_address") or "127.0.0.1", options.get("vllm_port") or ports.CONTROLLER
    path = "readyz" if "readiness" in arguments else "livez"
    try:
        return 0 if httpx.get(f"http://{host}:{port}/{path}", timeout=5).is_success else 1
    except httpx.HTTPError:
        return 1
