"""Tensor parallelism: the group, the shard of a rank, and the worker processes."""
