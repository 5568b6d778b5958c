"""Optimizers, learning-rate schedule, gradient clipping and the check for non-finite gradients.

May import `parallel`, `utils`, `constants` and `errors`.
"""
