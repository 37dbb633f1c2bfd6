"""The Python interface: train, load, evaluate, export. docs/python.md."""
