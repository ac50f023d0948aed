"""Processes of a job below the trainer: torchrun, ranks, nodes, signals, and failure records."""
