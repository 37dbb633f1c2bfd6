"""Routing: which tokens go through a recursion."""
