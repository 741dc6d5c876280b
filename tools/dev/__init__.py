"""Programs for developers: benchmarks and checks."""
