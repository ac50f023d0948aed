"""`python -m runtime`: the command `runtime`, also where its script is not on the path."""

from runtime.cli.main import main

main()
