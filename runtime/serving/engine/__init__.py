"""Text generation: token ids in, token ids out.

`protocol` says what an engine is, `create` makes one, `engine` is the one to read: its `step` is the loop.
"""
