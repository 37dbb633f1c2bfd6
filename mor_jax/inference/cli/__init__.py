"""Generation on the command line."""
