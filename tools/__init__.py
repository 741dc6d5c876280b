"""Programs for one person at a terminal: configurations, plans, data, scaling laws, text, reports, benchmarks."""
