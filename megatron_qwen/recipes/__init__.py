"""Named starting points: functions that return a RunConfig and differ from their base by a few lines."""
