"""Plans a run for devices that are not attached: memory, traffic and the best possible speed."""
