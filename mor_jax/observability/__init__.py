"""What a run reports: metrics, progress, events, goodput, profiles."""
