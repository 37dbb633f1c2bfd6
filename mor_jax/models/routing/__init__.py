"""Routing: which tokens each recursion processes."""
