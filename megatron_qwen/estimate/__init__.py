"""What a configuration will need and do, computed without torch."""
