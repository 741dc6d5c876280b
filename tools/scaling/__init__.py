"""Scaling laws: a study's plan, the fit of what it measured, and what the fit prescribes."""
