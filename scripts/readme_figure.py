"""Draw the picture of the README: alpha and weight decay of every module over one training run.

    python scripts/readme_figure.py RUN [--output FOLDER]

RUN is the folder of a finished run with a module-wise method. The script writes two files into
FOLDER, alphas_and_decays_light.svg and alphas_and_decays_dark.svg: GitHub shows the one that fits
the reader's theme. Letters are drawn as outlines, so the picture does not depend on fonts.
"""

import argparse
import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from peft_pretraining.cli.common import Parser  # noqa: E402
from peft_pretraining.cli.main import parse_or_exit, run_script  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(prog="scripts/readme_figure.py", description="Draw the picture of the README.")
    parser.add_argument("run", metavar="RUN", help="folder of a run with a module-wise method")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/images"),
        metavar="FOLDER",
        help="where the two files go (default docs/images)",
    )
    return parser.parse_args()


# The command line is parsed before the imports below, which take seconds: --help is answered at
# once.
if __name__ == "__main__":
    ARGUMENTS = parse_or_exit(parse_arguments)

import numpy as np  # noqa: E402

from peft_pretraining.errors import UserError  # noqa: E402
from peft_pretraining.records.reader import Modules, Run, read_run  # noqa: E402
from peft_pretraining.report.plots import (  # noqa: E402
    PALETTE,
    decay_in_eta,
    mean_of_known,
    types_in_order,
)

THEMES = {"light": "#1f2328", "dark": "#d1d7e0"}  # theme -> colour of text and axes
WIDTH, HEIGHT = 8.2, 3.1  # inches


def figure_style(ink: str) -> dict[str, object]:
    """Return the matplotlib settings of the picture.

    Args:
        ink: Colour of text and axes.
    """
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        "svg.fonttype": "path",
        "svg.hashsalt": "readme",  # the same run always gives the same file
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        **dict.fromkeys(coloured, ink),
    }


def draw_modules(axes, modules: Modules, values: np.ndarray, drawstyle: str) -> list:
    """Draw one thin line for each balanced module and one thick line for the mean of each type.

    Args:
        axes: Where to draw.
        modules: Module names, types and the updates of the analyses.
        values: The quantity to draw, [analyses, modules].
        drawstyle: `default`, or `steps-post` for values that stay constant between analyses.

    Returns:
        The thick lines, one for each module type.
    """
    means = []
    for k, kind in enumerate(types_in_order(modules, modules.balanced)):
        members = [i for i, t in enumerate(modules.types) if t == kind and modules.balanced[i]]
        line = {"color": PALETTE[k % len(PALETTE)], "drawstyle": drawstyle}
        for i in members:
            axes.plot(modules.steps, values[:, i], linewidth=0.7, alpha=0.45, **line)
        mean = mean_of_known(values[:, members])
        means += axes.plot(modules.steps, mean, linewidth=2, label=kind, **line)
    axes.set_xlabel("update")
    axes.set_xlim(0, modules.steps[-1])
    return means


def draw_picture(run: Run, ink: str) -> bytes:
    """Return the picture of a run as an SVG file.

    Args:
        run: A run with a module-wise method.
        ink: Colour of text and axes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    modules = run.modules
    with matplotlib.rc_context(figure_style(ink)):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        left, right = figure.subplots(1, 2)
        draw_modules(left, modules, modules.alpha, "default")
        left.set_title("alpha of every module")
        lines = draw_modules(right, modules, decay_in_eta(run, modules)[1], "steps-post")
        right.axhline(1, color=ink, linewidth=0.9, linestyle=(0, (4, 3)))
        right.set_title("weight decay of every module / eta")
        figure.legend(handles=lines, loc="outside right center", frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def main(args: argparse.Namespace) -> None:
    """Draw the picture for both themes and print the paths of the files."""
    run = read_run(args.run)
    if run.modules is None or not np.isfinite(run.modules.alpha).any() or not run.eta > 0:
        raise UserError(
            f"{args.run} has no alpha or no decay of a module: give a run of alphadecay"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    for theme, ink in THEMES.items():
        path = args.output / f"alphas_and_decays_{theme}.svg"
        path.write_bytes(draw_picture(run, ink))
        print(path)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))
