#!/bin/bash
# Finishes the image: the project itself, the links and directories that controllers expect, who may write where.
set -euo pipefail
version=$1

/opt/venv/bin/pip install -q --no-deps --no-index --no-cache-dir /wheels/*.whl
mv /wheels/sbom.cdx.json /usr/share/doc/workspace-runtime/
rm -rf /wheels

# A local diversion keeps a later upgrade of dash from taking /bin/sh back; dash's own would let it.
dpkg-divert --quiet --package dash --no-rename --divert /bin/sh.distrib --remove /bin/sh || true
dpkg-divert --quiet --local --no-rename --divert /bin/sh.distrib --add /bin/sh
rm -f /bin/sh
install -m 755 /usr/local/lib/runtime/sh /bin/sh

# Controllers mount weights at /workspace/weights; older ones look for them beside the scripts.
mkdir -p /workspace/weights
ln -s /workspace/weights /workspace/tfs/weights
ln -s /workspace/weights /workspace/vllm/weights
ln -s . /workspace/tfs/tfs
echo "$version" > /workspace/version.txt
ln -s /workspace/version.txt /workspace/tfs/version.txt

# Group 0 may write where root may: an arbitrary user id has that group. /root only to be passed through,
# for the registry secrets that controllers mount below it.
mkdir -p /cache /mnt/results /mnt/output /mnt/data /mnt/config /mnt/adapter
chgrp -R 0 /cache /mnt /workspace
chmod 2775 /cache /mnt/results /mnt/output /mnt/data /workspace/weights
chmod 711 /root
