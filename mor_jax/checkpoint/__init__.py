"""What lies in a run's directory: checkpoints, manifests, initial weights, and the lock."""
