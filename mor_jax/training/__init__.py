"""Training: the step, the loop, and the run around them."""
