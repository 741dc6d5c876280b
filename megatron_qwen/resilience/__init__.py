"""What a run does when something goes wrong: signals, heartbeat, exit codes, what is done after an attempt."""
