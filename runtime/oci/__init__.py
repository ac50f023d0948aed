"""Images in registries and in layouts on disk: push and pull. The only importer of `oras`."""
