"""The report of a study: one page, its figures and its data."""
