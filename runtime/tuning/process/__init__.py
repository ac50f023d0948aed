"""Processes: the parent, torchrun, ranks, nodes, signals, and how a job fails."""
