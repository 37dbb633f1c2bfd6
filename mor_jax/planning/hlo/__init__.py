"""Counts collectives and memory traffic of a compiled step in its optimised HLO text."""
