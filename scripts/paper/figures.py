"""Draw figures for a paper from run folders: alphas, decays, spectra, and the result against eta.

    python scripts/paper/figures.py RUN [RUN ...] --output FOLDER [--format pdf|svg|png] [--block N]

The figures are as wide as one column (3.4 inches) or two (7 inches). The path of each file is
printed:

* `alpha_by_type`: mean alpha of each module type at the last analysis, or in the newest checkpoint.
* `decays_RUN`: decay and alpha of every module at the last analysis, for each module-wise run.
* `esd_RUN`: eigenvalues of one block's weights in the newest checkpoint, and the fitted tails.
* `perplexity_against_decay` (language models), `top1_against_decay` (vision models): the final
  result against eta.

Runs that differ only in the seed are one point: their mean, with the standard deviation as its
error bar. What is left out is reported on stderr.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from peft_pretraining.cli.common import Parser
from peft_pretraining.cli.main import run_script
from peft_pretraining.errors import UserError

FORMATS = ("pdf", "svg", "png")


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(
        prog="scripts/paper/figures.py", description="Draw a paper's figures from run folders."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, those that hold run.json"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="where the files go"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="pdf", help="of the files (default pdf)"
    )
    parser.add_argument(
        "--block",
        type=int,
        metavar="N",
        help="whose spectra are drawn, counted from 0 (default: the middle one)",
    )
    return parser.parse_args()


def main() -> None:
    """Draw the figures and print their paths."""
    args = parse_arguments()
    # Imported here, because torch and matplotlib take seconds and --help needs neither.
    from peft_pretraining.records import reader
    from scripts.paper.drawing import draw

    # A run that is named twice is one run, not two seeds that agree.
    runs, problems = reader.read_runs(
        list({Path(name).resolve(): name for name in args.runs}.values())
    )
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    drawn = False
    for path in draw(runs, args.output, args.format, args.block):
        print(path)
        drawn = True
    if not drawn:
        raise UserError(
            "nothing to draw: give runs that have a final evaluation, a checkpoint, or decays "
            "by module"
        )


if __name__ == "__main__":
    sys.exit(run_script(main))
