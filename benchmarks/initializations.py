"""What one oddly initialised module does to all decays, in each power-law fit.

    python benchmarks/initializations.py

The model has eight balanced matrices (128 x 128 and 128 x 384). Seven are ordinary (normal, 0.02);
the odd one is initialised in several ways. Prints a table: the alpha and the decay of the odd
module as a multiple of eta, the decays of the seven others, and what the log says.
"""

import argparse
import io
import logging
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alphadecay import AlphaDecay  # noqa: E402
from alphadecay.constants import FIT_METHODS  # noqa: E402

WIDTH, ODD = 128, "layers.1.0"


def low_rank(rank: int) -> Callable[[torch.Tensor], None]:
    """Return an initialisation with the product of two normal matrices."""

    def fill(weight: torch.Tensor) -> None:
        weight.copy_(torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1]) * 0.02)

    return fill


INITIALIZATIONS: dict[str, Callable[[torch.Tensor], object]] = {
    "ordinary": lambda weight: nn.init.normal_(weight, std=0.02),
    "orthogonal": nn.init.orthogonal_,
    "identity": nn.init.eye_,
    "rank 16": low_rank(16),
    "rank 80": low_rank(80),
    "zero": nn.init.zeros_,
    "nearly flat": lambda weight: nn.init.orthogonal_(weight).add_(
        torch.randn(weight.shape), alpha=1e-4
    ),
}


def network(initialize: Callable[[torch.Tensor], object], dtype: torch.dtype) -> nn.Module:
    """Return the model."""
    torch.manual_seed(0)
    model = nn.Module()
    model.first, model.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    model.layers = nn.ModuleList(
        nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 3 * WIDTH, bias=False))
        for _ in range(4)
    )
    with torch.no_grad():
        for weight in model.layers.parameters():
            nn.init.normal_(weight, std=0.02)
        initialize(model.get_submodule(ODD).weight)
    return model.to(dtype)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger("alphadecay").addHandler(handler)
    print("| initialization | dtype | fit | alpha | its decay | the others' decays | log |")
    print("|---|---|---|---|---|---|---|")
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, dtype, method in product(INITIALIZATIONS, types, FIT_METHODS):
        text.seek(0), text.truncate()
        model = network(INITIALIZATIONS[name], types[dtype])
        rows = {row["module"]: row for row in AlphaDecay(model, 1.0, fit_method=method).history}
        odd = rows.pop(ODD)
        alpha = "–" if odd["alpha"] is None else f"{odd['alpha']:.4g}"
        others = [row["weight_decay"] for row in rows.values()]
        said = " ".join(text.getvalue().split()) or "nothing"
        print(
            f"| {name} | {dtype} | {method} | {alpha} | {odd['weight_decay']:.2f} | "
            f"{min(others):.2f} to {max(others):.2f} | {said} |"
        )


if __name__ == "__main__":
    main()
