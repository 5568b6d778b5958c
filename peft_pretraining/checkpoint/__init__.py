"""Checkpoints: format, saving, finding, loading."""
