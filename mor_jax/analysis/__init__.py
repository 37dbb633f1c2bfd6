"""Routing of a trained model: depth maps, statistics, loss by number of recursions."""
