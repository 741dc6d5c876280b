"""Conversations: the forms they are published in, rendering by the model's chat template, and loss masks."""
