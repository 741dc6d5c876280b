"""Studies that run: their directory, their database, and the controller that submits what is ready."""
