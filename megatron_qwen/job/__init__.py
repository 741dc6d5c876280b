"""A job on the nodes it was given: its controller, its ranks, its health check. Imports no torch."""
