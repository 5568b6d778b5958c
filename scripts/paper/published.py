"""The paper's tables (He et al. 2025, arXiv 2506.14562): which runs belong to each, how it is laid out, and the published numbers."""

from dataclasses import dataclass, field, replace

METHODS = (
    "wd0",
    "uniform",
    "awd",
    "adadecay-module",
    "alphadecay",
)  # the paper's "AdaDecay" is module-wise


@dataclass(frozen=True)
class Layout:
    """A table.

    rows, columns: settings whose values name a row and a column. where: values that settings must have. free: arguments in which a run may
    leave the published setting of its method. measure: what a cell shows. compared: what stands beside the published value: it was not
    always the correct measure that was published. published: by the labels of row and column. against: the row of the differences.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    where: dict[str, tuple[str, ...]] = field(default_factory=dict)
    free: tuple[str, ...] | None = None
    measure: str = "perplexity"
    compared: str = "reference_perplexity"
    published: dict[tuple[str, ...], float] = field(default_factory=dict)
    against: str | None = None

    def measuring(self, measure: str) -> "Layout":
        """The same table of another number, of which nothing was published."""
        return replace(self, measure=measure, compared=measure, published={})


def _by_decay(
    decays: tuple[float, ...], rows: dict[str, tuple], *column: str
) -> dict[tuple[str, ...], float]:
    """{row: a value for each decay} by (row, *column, decay)."""
    return {
        (row, *column, f"{eta:g}"): value
        for row, values in rows.items()
        for eta, value in zip(decays, values, strict=True)
    }


def _main(
    decays: tuple[float, ...], models: dict[str, tuple[float, dict[str, tuple]]]
) -> dict[tuple[str, ...], float]:
    """{model: (perplexity without decay, the other rows)} by (row, model, decay)."""
    published = {}
    for model, (none, rows) in models.items():
        published |= _by_decay(
            decays,
            {"wd0": (none,) * len(decays)} | dict(zip(METHODS[1:], rows, strict=True)),
            model,
        )
    return published


ADAM_DECAYS, ADAMW_DECAYS = (1e-5, 5e-6, 1e-6), (0.1, 0.05, 0.01)
_ADAM = _main(
    ADAM_DECAYS,
    {
        "60m": (
            33.23,
            (
                (32.39, 32.56, 33.03),
                (33.78, 33.74, 33.74),
                (32.24, 32.52, 33.03),
                (31.56, 31.58, 32.61),
            ),
        ),
        "130m": (
            24.60,
            (
                (22.99, 23.14, 24.14),
                (24.25, 24.45, 24.53),
                (23.20, 23.08, 23.96),
                (22.76, 22.55, 23.49),
            ),
        ),
        "350m": (
            18.62,
            (
                (17.12, 16.74, 17.50),
                (18.32, 18.55, 18.79),
                (18.21, 17.42, 17.91),
                (17.00, 16.66, 16.88),
            ),
        ),
        "1b": (
            16.11,
            (
                (15.36, 14.66, 15.03),
                (16.03, 16.22, 16.38),
                (17.23, 18.14, 15.35),
                (15.13, 14.55, 14.63),
            ),
        ),
    },
)
_ADAMW = _main(
    ADAMW_DECAYS,
    {
        "60m": (
            32.73,
            (
                (31.95, 32.31, 32.66),
                (32.58, 32.67, 32.67),
                (31.88, 32.25, 32.58),
                (31.20, 31.65, 32.45),
            ),
        ),
        "130m": (
            24.39,
            (
                (23.32, 23.81, 24.28),
                (24.30, 24.35, 24.41),
                (23.18, 23.62, 24.21),
                (22.66, 23.04, 23.98),
            ),
        ),
    },
)
_VIT = _by_decay(
    (5e-6, 1e-6),
    {"wd0": (65.12, 65.12), "uniform": (66.97, 66.41), "awd": (65.21, 64.98), "adadecay-module": (65.86, 66.26),
     "alphadecay": (67.40, 67.73)},
)  # fmt: skip
_SEEDS = _by_decay(
    ADAM_DECAYS, {"uniform": (22.97, 23.12, 24.12), "alphadecay": (22.77, 22.54, 23.44)}
)
_METRIC = _by_decay(
    ADAM_DECAYS,
    {"alpha": (22.763, 22.551, 23.488), "gradnorm": (22.855, 22.714, 23.801), "fnorm": (23.265, 22.910, 23.596),
     "spectral_norm": (23.348, 23.006, 23.601)},
)  # fmt: skip
_ASSIGNMENT = _by_decay(
    ADAM_DECAYS,
    {"tb_linear_map": (31.565, 31.582, 32.537), "tb_sqrt": (32.326, 32.517, 33.074), "tb_log2": (32.301, 32.501, 33.033),
     "layerwise_sigmoid": (32.201, 32.171, 33.095)},
)  # fmt: skip
_SECONDS = {
    (fit, model): seconds
    for fit, both in {
        "median": (1.67, 4.67),
        "goodness-of-fit": (8.7, 24.9),
        "fix-finger": (7.9, 21.5),
    }.items()
    for model, seconds in zip(("60m", "130m"), both, strict=True)
}


def _where(
    model: str | None = None,
    optimizer: str = "adam",
    methods: tuple[str, ...] | None = ("alphadecay",),
) -> dict:
    where = {
        "optimizer": (optimizer,),
        "model": (model,) if model else ("60m", "130m", "350m", "1b"),
    }
    return where | ({"method": methods} if methods else {})


_MODULEWISE = (
    "alphadecay",
    "farms",
    "quantile",
    "one_shot",
    "inverted",
    "shuffled",
    "type_constant",
    "gradnorm",
    "alphadecay+iso_budget",
)
TABLES = {
    "adam": Layout(
        "LLaMA on C4, Adam", ("method",), ("model", "weight_decay"), _where(methods=METHODS), (), published=_ADAM, against="uniform"
    ),
    "adamw": Layout(
        "LLaMA on C4, AdamW", ("method",), ("model", "weight_decay"), _where(optimizer="adamw", methods=METHODS), (), published=_ADAMW,
        against="uniform",
    ),
    "vit": Layout(
        "DeiT-tiny on ImageNet-1K, top-1 in %", ("method",), ("weight_decay",), _where("vit", methods=METHODS), (), "top1", "top1", _VIT,
        "uniform",
    ),
    "seeds": Layout(
        "LLaMA-135M over seeds", ("method",), ("weight_decay",), _where("130m", methods=("uniform", "alphadecay")), (), published=_SEEDS,
        against="uniform",
    ),
    "metric": Layout(
        "The statistic that scores a module (LLaMA-135M)", ("esd_metric_for_tb",), ("weight_decay",),
        _where("130m", methods=("alphadecay", "gradnorm")), ("esd_metric_for_tb",), published=_METRIC,
    ),
    "assignment": Layout(
        "The map from scores to decays (LLaMA-60M)", ("assign_func",), ("weight_decay",), _where("60m"), ("assign_func",),
        published=_ASSIGNMENT,
    ),
    "fit": Layout(
        "The power-law fit; in parentheses the seconds of one analysis, published on an A100", ("pl_fitting",), ("model",),
        _where() | {"weight_decay": ("5e-06",)}, ("pl_fitting",), compared="analysis_seconds", published=_SECONDS,
    ),
    "gap": Layout(
        "Updates between two analyses (LLaMA-60M)", ("unbalancedWD_every",), ("weight_decay",), _where("60m"), ("unbalancedWD_every",)
    ),
    "controls": Layout(
        "Controls (LLaMA-60M)", ("method",), ("weight_decay",), _where("60m", methods=("uniform", *_MODULEWISE)), (), against="uniform"
    ),
}  # fmt: skip
