"""Training components that the scripts share: data, model, optimizer, checkpoints and records."""
