"""Reports of a run: metrics, progress, events, goodput, profiles."""
