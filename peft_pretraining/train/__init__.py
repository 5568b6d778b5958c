"""The training loop's parts: resume, one step, evaluation, throughput, signals."""
