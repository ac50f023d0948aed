"""The command line: one module a command. Start at main."""
