"""The run configuration: typed sections, strict YAML, command-line overrides. Imports no torch."""
