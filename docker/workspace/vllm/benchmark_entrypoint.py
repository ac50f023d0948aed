"""The startup probe of controllers' vLLM pods; the work is runtime/pod/benchmark.py."""

import os
import sys

from runtime.pod import benchmark

if __name__ == "__main__":
    sys.exit(benchmark.run(os.environ))
