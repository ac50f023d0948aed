#!/usr/bin/env bash
# Builds the image and prints its size and how long it takes to start. `make image` calls this.
#
#   ACCELERATOR=cpu TORCH_INDEX=URL TAG=workspace-runtime:cpu docker/build.sh [the builder's own options]
#
# BUILDER is docker or buildah; every build argument of docker/Dockerfile may be set in the environment.
# buildah mounts local paths of PIP_FIND_LINKS and PIP_CERT into the build; docker cannot, and leaves them out.
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${TAG:-workspace-runtime:${ACCELERATOR:-cu130}}
builder=${BUILDER:-$(command -v docker >/dev/null && echo docker || echo buildah)}

arguments=(-f docker/Dockerfile -t "$tag"
  --build-arg "VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' runtime/__init__.py)"
  --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" "$@")
for name in ACCELERATOR BASE_IMAGE TORCH_INDEX PIP_INDEX_URL PIP_EXTRA_INDEX_URL SOURCE; do
  [ -z "${!name:-}" ] || arguments+=(--build-arg "$name=${!name}")
done

began=$SECONDS
if [ "$builder" = buildah ]; then
  runner=podman
  if [ -d "${PIP_FIND_LINKS:-}" ]; then
    arguments+=(--build-arg PIP_FIND_LINKS=/run/wheels --volume "$PIP_FIND_LINKS:/run/wheels:ro")
  fi
  if [ -f "${PIP_CERT:-}" ]; then
    arguments+=(--build-arg PIP_CERT=/run/ca.crt --volume "$(realpath "$PIP_CERT"):/run/ca.crt:ro")
  fi
  # The docker format keeps HEALTHCHECK, which the OCI format cannot hold.
  buildah bud --quiet --layers --format docker ${ISOLATION:+--isolation "$ISOLATION"} "${arguments[@]}" .
else
  runner=docker
  docker build "${arguments[@]}" .
fi
built=$((SECONDS - began))

"$runner" run --rm "$tag" version >/dev/null 2>&1 || { echo "the image does not start" >&2; exit 1; }
before=$(date +%s%N)
"$runner" run --rm "$tag" version >/dev/null 2>&1
started=$(( ($(date +%s%N) - before) / 1000000 ))
size=$("$runner" image inspect --format '{{.Size}}' "$tag")
echo "$tag: built in $built s, $((size / 1000000)) MB, \`runtime version\` answers after $started ms"
