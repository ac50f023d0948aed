"""The probes of controllers' multi-node vLLM pods; the work is runtime/pod/probes.py."""

import sys

from runtime.pod import probes

if __name__ == "__main__":
    sys.exit(probes.node_health(sys.argv[1:]))
