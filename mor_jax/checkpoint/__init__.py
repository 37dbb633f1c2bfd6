"""The contents of a run directory: checkpoints, manifests, initial weights and the lock."""
