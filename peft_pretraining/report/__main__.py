"""Write a run's report, or compare several runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from peft_pretraining.errors import UserError
from peft_pretraining.report.html import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 and the report's path on stdout, or 2 and one sentence on stderr."""
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
    try:
        print(write_report(*options.runs, output=options.output))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
