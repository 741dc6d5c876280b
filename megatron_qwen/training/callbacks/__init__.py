"""Features around the loop, a file each."""
