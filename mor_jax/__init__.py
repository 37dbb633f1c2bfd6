"""mor_jax: pretraining, study and serving of Mixture-of-Recursions language models in JAX."""

__version__ = "0.1.0"
