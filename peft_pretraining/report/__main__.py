"""The command that writes the report of a run, or a comparison of several runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from peft_pretraining.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report and print its path.

    Args:
        arguments: The arguments of the command; by default those of the process.

    Returns:
        The exit code: 0, or 2 after a UserError, whose message is printed on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m peft_pretraining.report",
        description="Write a run's report, or compare several runs.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder; several are set side by side"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the HTML file (default: RUN/report.html, or RUN/comparison.html for several)",
    )
    options = parser.parse_args(arguments)
    from peft_pretraining.report.html import write_report  # not needed for --help

    try:
        print(write_report(*options.runs, output=options.output))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
