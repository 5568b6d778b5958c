"""Logging to the console with loguru."""

import logging
import sys

from loguru import logger
from tqdm import tqdm

from peft_pretraining.parallel.process_group import DistributedContext


def start_logging(ranks: DistributedContext) -> None:
    """Send log lines to stderr, without breaking the progress bar.

    Rank 0 logs INFO and above; other ranks log WARNING and above, with their rank before the line.
    Records of the standard library's logger `alphadecay` are included.
    """
    logger.remove()
    line_format = "<dim>{time:HH:mm:ss}</dim> <level>{level: <7}</level> {message}"
    if not ranks.is_main:
        line_format = f"<dim>rank {ranks.rank}</dim> " + line_format
    logger.add(
        lambda line: tqdm.write(line, end="", file=sys.stderr),
        format=line_format,
        level="INFO" if ranks.is_main else "WARNING",
        colorize=sys.stderr.isatty(),
        diagnose=False,  # a traceback with the values of all variables would take pages
    )
    logging.getLogger("alphadecay").handlers = [_ToLoguru()]


class _ToLoguru(logging.Handler):
    """Passes records of the standard library's logging on to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.log(record.levelname, record.getMessage())


def block(title: str, entries: dict[str, str]) -> str:
    """Return a title with lines of names and texts below it, in two columns."""
    width = max(map(len, entries))
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in entries.items())])
