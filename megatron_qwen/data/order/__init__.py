"""The order in which training reads its sources: computed, never stored, and exact through every change."""
