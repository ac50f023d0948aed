"""A step of preset.Dockerfile: `bake.py PRESET [DIRECTORY]`; the work is runtime/pod/bake.py."""

import sys
from pathlib import Path

from runtime.errors import Failure, exit_code
from runtime.pod import bake

if __name__ == "__main__":
    preset, *mounted = sys.argv[1:]
    weights = [Path(word) for word in mounted if (Path(word) / "config.json").is_file()]
    try:
        bake.bake(preset, Path("/workspace/weights"), weights=weights[0] if weights else None)
    except Failure as failure:
        sys.stderr.write(f"error: {failure}\n")
        sys.exit(exit_code(failure))
