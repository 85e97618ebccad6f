"""The command line: a module a command; torch is imported only inside commands."""
