"""Constants that several packages share. This module imports nothing, so that --help is quick."""

IGNORE_INDEX = -100  # the label that torch's cross-entropy ignores

# Choices of command-line flags. What each name stands for is implemented in `optim/optimizer.py`,
# `model/linear_cross_entropy.py` and `vision/datasets.py`.
OPTIMIZERS = ("adam", "adamw", "muon")
LOSS_NAMES = ("chunked", "plain", "torch", "liger")
DATA_SETS = ("IMNET", "image_folder", "CIFAR", "CIFAR10", "CIFAR100", "digits")
