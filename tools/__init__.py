"""Programs for one person at a terminal: configuration, data, reports, benchmarks."""
