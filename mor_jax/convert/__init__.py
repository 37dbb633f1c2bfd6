"""Other implementations' models: names, configurations, layer selection, and proof of parity."""
