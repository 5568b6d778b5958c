"""Console lines: which rank logs what."""

import subprocess
import sys

import pytest

LOG = """
import logging, torch
from loguru import logger
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records.console import start_logging
for rank in (0, 1):
    start_logging(DistributedContext(rank, rank, 2, torch.device("cpu")))
    logger.debug(f"a debug line of {rank}")
    logger.info(f"an info line of {rank}")
    logging.getLogger("alphadecay").warning("a %s line of %d", "warning", rank)
"""


@pytest.mark.slow
def test_rank_zero_logs_all_and_other_ranks_only_warnings():
    done = subprocess.run([sys.executable, "-c", LOG], capture_output=True, text=True, check=True)
    *main, other = done.stderr.splitlines()
    assert [line.split(maxsplit=2)[1:] for line in main] == [
        ["INFO", "an info line of 0"],
        ["WARNING", "a warning line of 0"],
    ]
    assert other.startswith("rank 1 ") and other.endswith("WARNING a warning line of 1")
