"""Training: set-up, the trainer and its callbacks, checkpoints, progress, evaluation."""
