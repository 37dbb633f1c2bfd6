"""What the compile benchmark for absent GPUs is made of: cases, their programs, worker, tables."""
