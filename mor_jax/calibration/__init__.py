"""Calibration: thresholds of causal routing, fitted to text. docs/serving.md."""
