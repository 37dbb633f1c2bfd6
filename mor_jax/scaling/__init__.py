"""Scaling studies at equal FLOPs: plan, run, fit, report. The command is `mor isoflop`."""
