"""What a run does when something goes wrong: signals, heartbeat, exit codes, the requeue policy."""
