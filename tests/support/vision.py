"""Parts that the tests of image classification share."""

from __future__ import annotations

import argparse

import torch

from alphadecay.cli.flags import add_flags
from alphadecay.cli.presets import method_name
from peft_pretraining.cli.vit import complete, vit_parser
from peft_pretraining.parallel.process_group import DistributedContext

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))
SMALL_RUN = (
    "--input_size", "32", "--nb_classes", "4", "--data_path", "unused", "--warmup_epochs", "1",
)  # fmt: skip


def arguments(*more: object) -> argparse.Namespace:
    """Return the parsed flags of main_vit.py for a small run."""
    parser = vit_parser()
    add_flags(parser)
    args = parser.parse_args([*SMALL_RUN, *map(str, more)])
    return complete(args, 1, method_name(vars(args)))
