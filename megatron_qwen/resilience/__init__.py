"""What a run does when something goes wrong: signals, numbers that are not finite, a launcher that died."""
