"""Records of a run: metrics, modules, run.json, console and W&B."""
