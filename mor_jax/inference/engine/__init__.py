"""The engine: continuous depth-wise batching over a paged cache."""
