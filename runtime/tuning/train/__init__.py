"""The training loop: set-up, trainer, callbacks, checkpoints."""
