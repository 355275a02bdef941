"""What the programs that load adapters make of a file: by a table of their rules, and by running the installed ones."""
