"""Constants that several packages share. This module imports nothing, so that --help is quick."""

import signal

IGNORE_INDEX = -100  # the label that torch's cross-entropy ignores

# Choices of command-line flags. What each name stands for is implemented in `optim/optimizer.py`,
# `model/linear_cross_entropy.py` and `vision/datasets.py`.
OPTIMIZERS = ("adam", "adamw", "muon")
LOSS_NAMES = ("chunked", "plain", "torch", "liger")
DATA_SETS = ("IMNET", "image_folder", "CIFAR", "CIFAR10", "CIFAR100", "digits")

# They ask a run to stop: Ctrl-C, a closed terminal, and what Slurm, Kubernetes, other batch systems
# and torchrun send before a time limit or a preemption, often to every process of the run.
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
