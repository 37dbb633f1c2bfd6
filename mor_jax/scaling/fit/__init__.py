"""Fits of a study: minima, power laws, the parametric loss."""
