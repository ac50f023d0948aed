"""The servers that are attacked."""

from tests.serving.conftest import start_server, tokenizer

__all__ = ["start_server", "tokenizer"]
