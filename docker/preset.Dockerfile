# The image with one preset's weights in it: it serves with no download, and old controllers find the weights
# where they expect them.
#
#   docker build -f docker/preset.Dockerfile --build-arg IMAGE=workspace-runtime \
#     --build-arg PRESET=phi-3-mini-128k-instruct -t kaito-phi-3-mini-128k-instruct .
#
# The weights come from the Hugging Face hub at the preset's revision, or from a directory mounted at /weights
# (buildah: --volume DIR:/weights:ro). A preset whose licence forbids redistribution is refused.
ARG IMAGE=workspace-runtime
FROM ${IMAGE}
ARG PRESET
USER 0
COPY docker/bake.py /usr/local/lib/runtime/bake.py
RUN python3 /usr/local/lib/runtime/bake.py "${PRESET}" /weights
USER 10001:0
CMD ["serve"]
LABEL dev.workspace-runtime.preset="${PRESET}"
