"""HTML reports and their figures. Command: `python -m peft_pretraining.report`."""
