"""Token files (.bin, .idx and a manifest), on disk or in an object store: read, write, merge, verify."""
