"""Experiment configurations in `ml_collections`, without JAX. See docs/configuration.md."""
