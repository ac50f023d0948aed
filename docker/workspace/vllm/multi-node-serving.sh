#!/bin/bash
# Controllers call this before they serve a model on several nodes. This image serves from one node.
echo "error: this image serves a model on one node: set resource.count to 1, or quantise the model so that it fits" >&2
exit 2
