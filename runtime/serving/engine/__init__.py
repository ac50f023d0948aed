"""Text generation: token ids in, token ids out. `protocol` says what an engine is."""
