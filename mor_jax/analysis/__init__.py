"""Looking at what a trained model does: pictures and statistics of routing."""
