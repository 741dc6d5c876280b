"""Text that is better left out: too short or odd, poor, there already, or part of a test set."""
