"""Parity with the paper authors' implementation on recorded cases. See docs/parity.md."""
