"""Logging to the console with loguru."""

import logging
import sys

from loguru import logger
from tqdm import tqdm

from peft_pretraining.parallel.process_group import DistributedContext


def start_logging(ranks: DistributedContext) -> None:
    """Log lines through loguru: rank 0 tells all, the others warnings only; they do not break the progress bar."""
    logger.remove()
    form = "<dim>{time:HH:mm:ss}</dim> <level>{level: <7}</level> {message}"
    form = form if ranks.is_main else f"<dim>rank {ranks.rank}</dim> " + form
    level = "INFO" if ranks.is_main else "WARNING"
    logger.add(
        lambda line: tqdm.write(line, end="", file=sys.stderr),
        format=form,
        level=level,
        colorize=sys.stderr.isatty(),
    )
    logging.getLogger("alphadecay").handlers = [_ToLoguru()]


class _ToLoguru(logging.Handler):
    """The standard library's log records, passed on to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.log(record.levelname, record.getMessage())
