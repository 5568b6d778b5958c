"""Records of a run: metrics, modules, run.json, console and W&B; writing and reading them.

May import `parallel`, `utils`, `constants` and `errors`.
"""
