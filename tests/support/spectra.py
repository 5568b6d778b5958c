"""Matrices whose spectrum is known."""

import torch


def spectrum_matrix(singular, rows=None, seed=0):
    """A matrix with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = len(singular)
    left, _ = torch.linalg.qr(torch.randn(rows or n, n, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return left * torch.as_tensor(singular, dtype=torch.float64) @ right
