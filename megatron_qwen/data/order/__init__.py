"""The order in which training reads its sources: computed, not stored, and exact across changes of mix and length."""
