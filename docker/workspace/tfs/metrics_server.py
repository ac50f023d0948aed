"""What controllers start beside training, in the background; the work is runtime/pod/metrics.py."""

import os
import sys

from runtime.pod import metrics

if __name__ == "__main__":
    sys.exit(metrics.main(os.environ))
