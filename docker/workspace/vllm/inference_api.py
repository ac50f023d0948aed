"""What controllers start for the vLLM runtime: this project's own server, configured by vLLM's flags."""

import os
import sys

from runtime import garbage_collection
from runtime.pod import inference

if __name__ == "__main__":
    folder = inference.download_folder(sys.argv[1:])
    if folder and os.access(folder, os.W_OK):
        os.environ["HF_HUB_CACHE"] = folder  # read when the hub's library is imported
    garbage_collection.exit_without(inference.main(inference.vllm_server, sys.argv[1:], os.environ))
