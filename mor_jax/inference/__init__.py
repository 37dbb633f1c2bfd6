"""Generation: causal routing, recursion-wise caches and continuous depth-wise batching."""
