"""Decoding: the same mathematics as the training modules, on tokens whose past is in a cache.

Everything here works on flat lists of tokens ("rows") of different sequences and depths, because
that is what depth-wise batching hands to a shared block.
"""
