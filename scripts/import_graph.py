"""Draw which part of the packages imports which, as the picture of docs/layout.md.

    python scripts/import_graph.py [--output docs/images/import_graph.svg]

A part is a folder or a file directly in a package. It stands one level above the highest part that
it imports. An arrow points to an imported part; it is left out if a longer way along other arrows
leads to the same part. The script fails if there is a circle, or if a level has more than 8 parts.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from peft_pretraining.cli.common import Parser  # noqa: E402
from peft_pretraining.cli.main import run_script  # noqa: E402
from peft_pretraining.errors import UserError  # noqa: E402

if TYPE_CHECKING:  # imported after the arguments have been parsed
    from matplotlib.axes import Axes

PACKAGES = {"alphadecay": "#3b6ea5", "peft_pretraining": "#a5673b"}  # package -> colour
MAX_PARTS = 8
BOX_WIDTH, BOX_HEIGHT, LEVEL_HEIGHT = 1.55, 0.32, 1.0  # data units
INCHES = 0.62  # for one data unit

Imports = dict[str, set[str]]  # part -> the parts that it imports


def imports_of(package: str) -> Imports:
    """Return which parts of a package import which, read from the source files."""
    import grimp

    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    parts = graph.find_children(package)
    for part in parts:
        graph.squash_module(part)
    return {
        part.split(".")[1]: {
            name.split(".")[1] for name in graph.find_modules_directly_imported_by(part) & parts
        }
        for part in sorted(parts)
    }


def levels_of(imports: Imports) -> list[list[str]]:
    """Return the parts of each level, from the bottom to the top.

    Raises:
        UserError: some parts import each other in a circle, or a level has too many parts.
    """
    level: dict[str, int] = {}
    while len(level) < len(imports):
        ready = {p for p, used in imports.items() if p not in level and used <= level.keys()}
        if not ready:
            circle = ", ".join(sorted(imports.keys() - level.keys()))
            raise UserError(f"these parts import each other in a circle: {circle}")
        level |= {p: 1 + max((level[used] for used in imports[p]), default=-1) for p in ready}
    levels = [sorted(p for p in level if level[p] == k) for k in range(1 + max(level.values()))]
    for parts in levels:
        if len(parts) > MAX_PARTS:
            raise UserError(
                f"{', '.join(parts)} are more than {MAX_PARTS} parts on one level: "
                "put some of them into a folder"
            )
    return levels


def drawn_arrows(imports: Imports) -> list[tuple[str, str]]:
    """Return the imports that no longer way along other imports implies."""
    below: Imports = {}
    for parts in levels_of(imports):
        for part in parts:
            below[part] = set.union(imports[part], *(below[used] for used in imports[part]))
    return [
        (part, used)
        for part in imports
        for used in sorted(imports[part])
        if not any(used in below[other] for other in imports[part])
    ]


def description() -> str:
    """Return the imports of both packages as text, which the picture carries as its description."""
    lines = []
    for package in PACKAGES:
        for part, used in imports_of(package).items():
            lines.append(f"{package}.{part} imports {', '.join(sorted(used)) or 'nothing'}.")
    return " ".join(lines)


def places_of(imports: Imports) -> dict[str, tuple[float, float]]:
    """Return the centre of each part's box. Parts stand near those that they import."""
    levels = levels_of(imports)
    widest = max(map(len, levels))
    places: dict[str, tuple[float, float]] = {}
    for height, parts in enumerate(levels):

        def mean_x(part: str) -> float:
            used = [places[name][0] for name in imports[part]]
            return sum(used) / len(used) if used else 0.0

        step = widest / len(parts) * BOX_WIDTH * 1.12
        for k, part in enumerate(sorted(parts, key=lambda part: (mean_x(part), part))):
            places[part] = ((k + 0.5) * step, height * LEVEL_HEIGHT)
    return places


def draw_package(axes: "Axes", package: str, colour: str) -> None:
    """Draw the boxes and arrows of a package."""
    imports = imports_of(package)
    places = places_of(imports)
    for part, used in drawn_arrows(imports):
        (x, y), (to_x, to_y) = places[part], places[used]
        bend = 0.0 if y - to_y < 1.5 * LEVEL_HEIGHT else 0.22  # around the boxes in between
        axes.annotate(
            "",
            xy=(to_x, to_y + BOX_HEIGHT / 2),
            xytext=(x, y - BOX_HEIGHT / 2),
            arrowprops={
                "arrowstyle": "-|>",
                "connectionstyle": f"arc3,rad={bend}",
                "color": colour,
                "alpha": 0.55,
                "linewidth": 0.9,
            },
        )
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": colour}
    for part, (x, y) in places.items():
        label = f"{part}/" if (ROOT / package / part).is_dir() else part
        axes.text(x, y, label, ha="center", va="center", fontsize=8, bbox=box)
    xs, ys = zip(*places.values(), strict=True)
    axes.set_xlim(min(xs) - BOX_WIDTH / 2, max(xs) + BOX_WIDTH / 2)
    axes.set_ylim(min(ys) - 0.5, max(ys) + 0.5)
    axes.set_title(package, color=colour, fontsize=11)
    axes.axis("off")


def draw(output: Path) -> None:
    """Write the picture of both packages, the same file for the same imports."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "svg.fonttype": "path",
        "svg.hashsalt": "imports",
    }
    sizes = []
    for package in PACKAGES:
        levels = levels_of(imports_of(package))
        sizes.append((max(map(len, levels)) * BOX_WIDTH * 1.12, len(levels) * LEVEL_HEIGHT))
    width, height = sum(w for w, _ in sizes), max(h for _, h in sizes)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width * INCHES, height * INCHES + 0.5), layout="constrained")
        panels = figure.subplots(1, len(PACKAGES), width_ratios=[w for w, _ in sizes])
        for axes, (package, colour) in zip(panels, PACKAGES.items(), strict=True):
            draw_package(axes, package, colour)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, format="svg", metadata={"Date": None, "Description": description()})


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(prog="scripts/import_graph.py", description="Draw which part imports which.")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs/images/import_graph.svg",
        metavar="FILE",
        help="the SVG file (default docs/images/import_graph.svg)",
    )
    return parser.parse_args()


def main() -> None:
    """Draw the picture and print its path."""
    args = parse_arguments()
    draw(args.output)
    print(args.output)


if __name__ == "__main__":
    sys.exit(run_script(main))
