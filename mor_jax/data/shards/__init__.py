"""Tokens prepared on disk: written once, read by position."""
