"""The model family: plain Llama, recursive, and Mixture-of-Recursions."""
