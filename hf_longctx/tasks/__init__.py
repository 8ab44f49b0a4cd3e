"""Synthetic long-context texts and tasks, generated and seeded."""
