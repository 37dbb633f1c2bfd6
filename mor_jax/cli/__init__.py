"""Commands: the parsing of flags, and errors in the words of the command line."""
