"""The process and its machine: signals, exit codes, memory, hardware, compilation cache."""
