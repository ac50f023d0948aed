"""What controllers start as `accelerate launch … fine_tuning.py`; the work is runtime/pod/fine_tuning.py."""

import os
import sys

from runtime import garbage_collection
from runtime.pod import fine_tuning

if __name__ == "__main__":
    garbage_collection.exit_without(fine_tuning.main(sys.argv[1:], os.environ))
