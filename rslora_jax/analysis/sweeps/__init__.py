"""Sweeps: many ranks trained at once, and what their slopes mean."""
