"""HTML reports and their figures. The command is `python -m peft_pretraining.report`.

May import `records`, `utils`, `constants` and `errors`.
"""
