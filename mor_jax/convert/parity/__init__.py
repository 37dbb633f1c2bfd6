"""Parity with the paper authors' implementation, on its recorded cases. docs/parity.md."""
