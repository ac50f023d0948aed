"""What controllers start as `accelerate launch … inference_api.py`; the work is runtime/pod/inference.py."""

import os
import sys

from runtime import garbage_collection
from runtime.pod import inference

if __name__ == "__main__":
    garbage_collection.exit_without(inference.main(inference.transformers_server, sys.argv[1:], os.environ))
