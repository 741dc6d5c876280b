"""All that fits a study: from observations to laws, and from laws to the configuration of a large run."""
