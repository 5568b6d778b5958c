"""Checkpoints: their format, and how they are saved, found, verified, loaded and deleted.

May import `parallel`, `utils`, `constants` and `errors`.
"""
