#!/usr/bin/env bash
# Installs the dependencies of pyproject.toml at the versions of constraints.txt, with the torch build for $ACCELERATOR.
set -euo pipefail
cd "$(dirname "$0")"
pip=/opt/venv/bin/pip
torch=$(sed -n 's/^torch==//p' constraints.txt)

case "$ACCELERATOR" in
  cu130) wanted=13.0 ;;
  cu126) wanted=12.6 ;;
  cpu) wanted=None ;;
  *) echo "ACCELERATOR is '$ACCELERATOR', expected cu130, cu126 or cpu" >&2; exit 2 ;;
esac

# The default index lists its build, which is the cu130 one, under the bare version.
spec="torch==$torch+$ACCELERATOR"
if [ -n "${TORCH_INDEX:-}" ]; then
  "$pip" install -q "$spec" --index-url "$TORCH_INDEX"
elif [ "$ACCELERATOR" = cu130 ]; then
  "$pip" install -q -c constraints.txt -c cu130.txt "torch==$torch"
else
  "$pip" install -q -c constraints.txt "$spec" || {
    echo "No torch build for $ACCELERATOR here: pass --build-arg TORCH_INDEX=<PyTorch's wheel index for it>" >&2
    exit 2
  }
fi

/opt/venv/bin/python - > requirements.txt <<'PYTHON'
import tomllib
with open("pyproject.toml", "rb") as stream:
    project = tomllib.load(stream)["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["guided"], *extras["tensorboard"], sep="\n")
PYTHON
"$pip" install -q -c constraints.txt -r requirements.txt

# Not needed to run anything, and large: test suites, headers for compilers that are not in the image, and
# bitsandbytes' kernels for other CUDA releases than that of torch, by which it chooses.
cd /opt/venv/lib/python3*/site-packages
rm -rf torch/include torch/test pandas/tests pyarrow/tests pyarrow/include
find numpy sympy networkx -type d -name tests -prune -exec rm -rf {} +
# Triton compiles at run time and wants the C compiler that the image does not have. Of CUDA, nothing that
# libtorch_cuda.so loads: the multi-GPU solver, a second nvrtc, profilers' libraries, what one links or compiles with.
if [ "$ACCELERATOR" != cpu ]; then
  "$pip" uninstall -q -y triton
  rm -rf nvidia/cu*/lib/lib{cusolverMg,nvrtc.alt,nvrtc-builtins.alt,nvperf_host,nvperf_target}.* nvidia/nvshmem/lib/*.bc \
    nvidia/*/include nvidia/cu*/{bin,nvvm}
  find nvidia -name '*.a' -delete
fi
find bitsandbytes -name 'libbitsandbytes_*.so' ! -name libbitsandbytes_cpu.so ! -name "libbitsandbytes_cuda${ACCELERATOR#cu}.so" -delete

# After the trimming: torch does not start without a library that it links.
found=$(/opt/venv/bin/python -c 'import torch; print(torch.version.cuda)')
[ "$found" = "$wanted" ] || { echo "torch was built for CUDA $found, ACCELERATOR=$ACCELERATOR needs $wanted" >&2; exit 2; }
