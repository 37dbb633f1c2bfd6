"""Experiment configurations: plain `ml_collections`, no JAX. docs/configuration.md is the guide."""
