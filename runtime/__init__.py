"""Tunes and serves language models in one container: `runtime tune`, `runtime serve`."""

__version__ = "0.2.0"
