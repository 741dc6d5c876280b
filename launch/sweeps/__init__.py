"""All that runs a study: its plan, its directory and database, its controller, and what became of each run."""
