"""Builds the serving engine's kernels into the wheel, or into the tree of an editable install.

Without a C compiler that can compile them the project is installed without kernels: torch's own operations
then compute the same, slower on a CPU. CC names the compiler.
"""

import os
import shlex
import subprocess
import sysconfig
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "runtime/serving/engine/kernels"
LIBRARY = f"{FOLDER}/libkernels.so"
FLAGS = ("-O2", "-ftree-vectorize", "-fPIC", "-shared", "-Wno-psabi")  # psabi: no vector crosses a call


class Kernels(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the kernels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile and tag the wheel for this platform; leave it a wheel for any platform if that fails."""
        root = Path(self.root)
        compiler = shlex.split(os.environ.get("CC", "cc"))
        made = root / f"{LIBRARY}.part"
        sources = sorted((root / FOLDER).glob("*.[ch]"))
        # the checksum of kernels/__init__.py, which cannot be imported here: torch is not installed
        checksum = zlib.crc32(b"".join(path.read_bytes() for path in sources))
        command = [*compiler, *FLAGS, f"-DBUILT_FROM={checksum}", "-o", str(made)]
        command += [*(str(path) for path in sources if path.suffix == ".c"), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - CC is set by the builder
            made.replace(root / LIBRARY)  # processes that have the old one loaded keep it
        except (OSError, subprocess.CalledProcessError) as failure:
            (root / LIBRARY).unlink(missing_ok=True)
            reason = getattr(failure, "stderr", None) or str(failure)
            self.app.display_warning(
                f"{FOLDER} was not compiled, serving on a CPU is slower: {reason.strip()}"
            )
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
