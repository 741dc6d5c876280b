"""Scaling laws: a study's plan, the fit of what it measured, its report, and what the fit prescribes."""
