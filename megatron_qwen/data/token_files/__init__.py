"""Token files (.bin, .idx and a manifest): written, read, joined, verified; on a disk or in an object store."""
