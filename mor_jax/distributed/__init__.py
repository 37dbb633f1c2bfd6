"""Devices and processes: the mesh, collectives, start, heartbeat and end of a job."""
