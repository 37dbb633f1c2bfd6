"""Imports and exports: names, configurations, upcycling, and parity with the reference."""
