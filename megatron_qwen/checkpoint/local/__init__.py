"""Checkpoints in the memory or on the disks of the nodes, with a copy on another node."""
