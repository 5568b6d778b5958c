"""The paper's tables (He et al. 2025, arXiv 2506.14562).

For each table: which runs belong to it, how it is laid out, and the published numbers. The settings
of the published runs are here too, so that a number is printed beside comparable runs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# The methods of the main tables, in their order. The paper's "AdaDecay" is the module-wise one.
PAPER_METHODS = ("wd0", "uniform", "awd", "adadecay-module", "alphadecay")
Key = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """A table.

    Args:
        title: the line above the table.
        rows: settings whose values name a row.
        columns: settings whose values name a column.
        where: setting -> the values of which a run must have one.
        may_vary: settings in which a run may differ from the published ones of its method; None:
            all.
        measure: the number that a cell shows.
        published_measure: the number printed beside the published value. It is not always
            `measure`: for language models the paper's code averaged with a count that was one too
            high (reference_perplexity).
        published: published values by the labels of row and column.
        against: label of the row that the others are compared with.
        published_of_training: the published values are results of training, which depend on its
            settings. False: they are times of an analysis.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    where: dict[str, Key] = field(default_factory=dict)
    may_vary: tuple[str, ...] | None = None
    measure: str = "perplexity"
    published_measure: str = "reference_perplexity"
    published: dict[Key, float] = field(default_factory=dict)
    against: str | None = None
    published_of_training: bool = True

    @property
    def measures(self) -> list[str]:
        """The numbers that the table needs of each run."""
        measures = (self.measure, self.published_measure) if self.published else (self.measure,)
        return list(dict.fromkeys(measures))

    def with_measure(self, measure: str) -> Layout:
        """Return the same table for another number, without published values."""
        return replace(self, measure=measure, published_measure=measure, published={})


def _by_decay(
    decays: Sequence[float], rows: dict[str, tuple[float, ...]], *column: str
) -> dict[Key, float]:
    """Turn {row: a value for each decay} into {(row, *column, decay): value}."""
    return {
        (row, *column, f"{decay:g}"): value
        for row, values in rows.items()
        for decay, value in zip(decays, values, strict=True)
    }


def _by_model_and_decay(
    decays: Sequence[float],
    models: dict[str, tuple[float, tuple[tuple[float, ...], ...]]],
) -> dict[Key, float]:
    """Turn {model: (value without decay, rows of the other methods)} into values by their labels.

    The labels of a value are (row, model, decay).
    """
    published: dict[Key, float] = {}
    for model, (without_decay, values) in models.items():
        rows = {"wd0": (without_decay,) * len(decays)}
        rows |= dict(zip(PAPER_METHODS[1:], values, strict=True))
        published |= _by_decay(decays, rows, model)
    return published


# ---------------------------------------------------------------------------- published values

ADAM_DECAYS, ADAMW_DECAYS = (1e-5, 5e-6, 1e-6), (0.1, 0.05, 0.01)
# Perplexity: without decay; then rows uniform, AWD, AdaDecay, AlphaDecay; a column for each decay.
_ADAM = _by_model_and_decay(ADAM_DECAYS, {
    "60m": (33.23, (
        (32.39, 32.56, 33.03), (33.78, 33.74, 33.74), (32.24, 32.52, 33.03), (31.56, 31.58, 32.61),
    )),
    "130m": (24.60, (
        (22.99, 23.14, 24.14), (24.25, 24.45, 24.53), (23.20, 23.08, 23.96), (22.76, 22.55, 23.49),
    )),
    "350m": (18.62, (
        (17.12, 16.74, 17.50), (18.32, 18.55, 18.79), (18.21, 17.42, 17.91), (17.00, 16.66, 16.88),
    )),
    "1b": (16.11, (
        (15.36, 14.66, 15.03), (16.03, 16.22, 16.38), (17.23, 18.14, 15.35), (15.13, 14.55, 14.63),
    )),
})  # fmt: skip
_ADAMW = _by_model_and_decay(ADAMW_DECAYS, {
    "60m": (32.73, (
        (31.95, 32.31, 32.66), (32.58, 32.67, 32.67), (31.88, 32.25, 32.58), (31.20, 31.65, 32.45),
    )),
    "130m": (24.39, (
        (23.32, 23.81, 24.28), (24.30, 24.35, 24.41), (23.18, 23.62, 24.21), (22.66, 23.04, 23.98),
    )),
})  # fmt: skip
# Top-1 accuracy in %.
_VIT = _by_decay((5e-6, 1e-6), {
    "wd0": (65.12, 65.12),
    "uniform": (66.97, 66.41),
    "awd": (65.21, 64.98),
    "adadecay-module": (65.86, 66.26),
    "alphadecay": (67.40, 67.73),
})  # fmt: skip
# Perplexity.
_SEEDS = _by_decay(ADAM_DECAYS, {
    "uniform": (22.97, 23.12, 24.12),
    "alphadecay": (22.77, 22.54, 23.44),
})  # fmt: skip
_METRIC = _by_decay(ADAM_DECAYS, {
    "alpha": (22.763, 22.551, 23.488),
    "gradnorm": (22.855, 22.714, 23.801),
    "fnorm": (23.265, 22.910, 23.596),
    "spectral_norm": (23.348, 23.006, 23.601),
})  # fmt: skip
_ASSIGNMENT = _by_decay(ADAM_DECAYS, {
    "tb_linear_map": (31.565, 31.582, 32.537),
    "tb_sqrt": (32.326, 32.517, 33.074),
    "tb_log2": (32.301, 32.501, 33.033),
    "layerwise_sigmoid": (32.201, 32.171, 33.095),
})  # fmt: skip
_OTHER_MAPS = ("tb_sqrt", "tb_log2", "layerwise_sigmoid")
# Seconds of one analysis.
_SECONDS = {
    ("median", "60m"): 1.67, ("median", "130m"): 4.67,
    ("goodness-of-fit", "60m"): 8.7, ("goodness-of-fit", "130m"): 24.9,
    ("fix-finger", "60m"): 7.9, ("fix-finger", "130m"): 21.5,
}  # fmt: skip

# ------------------------------------------------------------- settings of the published runs

_LLAMA_SETTINGS = {
    "total_batch_size": 512,
    "max_length": 256,
    "scheduler": "cosine",
    "min_lr_ratio": 0.1,
    "grad_clipping": 0.0,
    "packing": False,
    "dtype": "bfloat16",
    "use_hf_model": False,
}
_VIT_SETTINGS = {
    "data_set": "IMNET",
    "epochs": 120,
    "warmup_epochs": 20,
    "total_batch_size": 384,
    "lr": 4e-3,
    "input_size": 224,
    "drop_path": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "aa": "rand-m9-mstd0.5-inc1",
    "reprob": 0.25,
    "optimizer": "adam",
}
# model -> updates, peak learning rate
_LENGTHS = {"60m": (10_000, 1e-3), "130m": (20_000, 1e-3), "350m": (60_000, 1e-3),
            "1b": (90_000, 6e-4)}  # fmt: skip
_MAPS_WITH_RANGE = ("tb_linear_map", "tb_quantile")


def published_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the published run of a run's cell has, by the names of flags.

    Args:
        settings: of the run; model, optimizer, weight decay and method select the published run.
    """
    model, optimizer = settings.get("model"), settings.get("optimizer")
    decay = settings.get("weight_decay")
    if model == "vit":
        expected: dict[str, Any] = dict(_VIT_SETTINGS)
    else:
        steps, lr = _LENGTHS.get(str(model), (None, None))
        expected = _LLAMA_SETTINGS | {
            "num_training_steps": steps,
            "warmup_steps": steps and steps // 10,
            "lr": lr,
        }
    if settings.get("use_modulewise_wd") and settings.get("assign_func") in _MAPS_WITH_RANGE:
        narrow = (model, decay) == ("vit", 5e-6) or (
            model != "vit" and optimizer == "adam" and decay == 1e-5
        )
        expected |= {"wd_min_ratio": 0.6666, "wd_max_ratio": 3.0 if narrow else 5.0}
    return expected


def deviations(settings: dict[str, Any]) -> list[str]:
    """Return in which settings a run differs from the published one of its cell.

    Args:
        settings: of the run, see `results.settings_of`. Settings that are not recorded do not
            count.

    Returns:
        Texts such as `lr 0.002`; `rehearsal` alone for a rehearsal. Empty: the run is comparable.
    """
    if settings.get("rehearsal"):
        return ["rehearsal"]
    found = [
        f"{name} {settings[name]}"
        for name, value in published_settings(settings).items()
        if settings.get(name) is not None and settings[name] != value
    ]
    if settings.get("model") != "vit":
        source, tokenizer = settings.get("data_source"), settings.get("tokenizer_name")
        if source and Path(str(source)).name.lower() != "c4":
            found.append(f"data {Path(str(source)).name}")
        if tokenizer and not str(tokenizer).endswith("t5-base"):
            found.append(f"tokenizer {Path(str(tokenizer)).name}")
    return found


# -------------------------------------------------------------------------------------- layouts


def _where(
    model: str | None = None,
    optimizer: str = "adam",
    methods: tuple[str, ...] = ("alphadecay",),
) -> dict[str, Key]:
    """Return the settings that runs of a table must have; without a model, any LLaMA."""
    models = (model,) if model else ("60m", "130m", "350m", "1b")
    return {"optimizer": (optimizer,), "model": models, "method": methods}


TABLES = {
    "adam": Layout(
        title="LLaMA on C4, Adam",
        rows=("method",),
        columns=("model", "weight_decay"),
        where=_where(methods=PAPER_METHODS),
        may_vary=(),
        published=_ADAM,
        against="uniform",
    ),
    "adamw": Layout(
        title="LLaMA on C4, AdamW",
        rows=("method",),
        columns=("model", "weight_decay"),
        where=_where(optimizer="adamw", methods=PAPER_METHODS),
        may_vary=(),
        published=_ADAMW,
        against="uniform",
    ),
    "vit": Layout(
        title="DeiT-tiny on ImageNet-1K, top-1 in %",
        rows=("method",),
        columns=("weight_decay",),
        where=_where("vit", methods=PAPER_METHODS),
        may_vary=(),
        measure="top1",
        published_measure="top1",
        published=_VIT,
        against="uniform",
    ),
    "seeds": Layout(
        title="LLaMA-135M over seeds",
        rows=("method",),
        columns=("weight_decay",),
        where=_where("130m", methods=("uniform", "alphadecay")),
        may_vary=(),
        published=_SEEDS,
        against="uniform",
    ),
    "metric": Layout(
        title="The statistic that scores a module (LLaMA-135M)",
        rows=("esd_metric_for_tb",),
        columns=("weight_decay",),
        where=_where(
            "130m",
            methods=("alphadecay", "gradnorm", "alphadecay+fnorm", "alphadecay+spectral_norm"),
        ),
        may_vary=("esd_metric_for_tb",),
        published=_METRIC,
    ),
    "assignment": Layout(
        title="The map from scores to decays (LLaMA-60M)",
        rows=("assign_func",),
        columns=("weight_decay",),
        where=_where(
            "60m",
            methods=("alphadecay", *(f"alphadecay+{name}" for name in _OTHER_MAPS)),
        ),
        may_vary=("assign_func",),
        published=_ASSIGNMENT,
    ),
    "fit": Layout(
        title="The power-law fit; in parentheses the seconds of one analysis, published on an A100",
        rows=("pl_fitting",),
        columns=("model",),
        where=_where() | {"weight_decay": ("5e-06",)},
        may_vary=("pl_fitting",),
        published_measure="analysis_seconds",
        published=_SECONDS,
        published_of_training=False,
    ),
    "gap": Layout(
        title="Updates between two analyses (LLaMA-60M)",
        rows=("unbalancedWD_every",),
        columns=("weight_decay",),
        where=_where("60m"),
        may_vary=("unbalancedWD_every",),
    ),
    "controls": Layout(
        title="Controls (LLaMA-60M)",
        rows=("method",),
        columns=("weight_decay",),
        where=_where(
            "60m",
            methods=(
                "uniform",
                "alphadecay",
                "farms",
                "quantile",
                "one_shot",
                "inverted",
                "shuffled",
                "type_constant",
                "gradnorm",
                "alphadecay+iso_budget",
            ),
        ),
        may_vary=(),
        against="uniform",
    ),
}
