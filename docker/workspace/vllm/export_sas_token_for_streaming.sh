#!/bin/bash
# Controllers source this before a server whose weights are streamed from a blob store.
echo "error: weights are not streamed here: switch the controller's feature gate ModelStreaming off" >&2
exit 2
