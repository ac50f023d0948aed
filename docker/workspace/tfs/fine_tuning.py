"""What controllers start as `accelerate launch … fine_tuning.py`; the work is runtime/pod/fine_tuning.py."""

import os
import sys

from runtime import process
from runtime.pod import fine_tuning

if __name__ == "__main__":
    process.leave(fine_tuning.main(sys.argv[1:], os.environ))
