"""One file per command, which parses, calls and prints. Each imports what it needs when it runs: torch and transformers
take seconds. The table of commands is in cli.py."""
