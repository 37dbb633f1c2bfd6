"""Dot-product attention: several implementations of the same numbers."""
