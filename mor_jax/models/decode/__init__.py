"""Decoding with a KV cache: the same mathematics as the training modules.

All functions work on flat lists of tokens ("rows") of different sequences and depths, because
depth-wise batching runs the shared block on such lists.
"""
