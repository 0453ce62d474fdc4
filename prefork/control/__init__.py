"""The command line, and what starts a master."""
