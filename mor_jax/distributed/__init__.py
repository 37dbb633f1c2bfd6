"""Devices and processes: the mesh, collectives, initialisation, heartbeats and shutdown."""
