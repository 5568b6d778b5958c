"""Training parts shared by the scripts: data, model, optimizer, evaluation, checkpoints, run log."""
