"""Prints the architectures that can be served, one a line, as config.json names them."""

from runtime import models

if __name__ == "__main__":
    for name in models.architectures():
        print(name)  # noqa: T201 - its output
