"""Baselines that set weight decays without a spectrum: AWD and AdaDecay."""

import importlib

from alphadecay.deprecated import warn_deprecated


def __getattr__(name: str) -> type:
    """Import AWD and AdaDecay from this package, where they were before, with a warning."""
    if name not in ("AWD", "AdaDecay"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_deprecated(f"alphadecay.baselines.{name}", f"alphadecay.{name}")
    baseline: type = getattr(importlib.import_module(f"{__name__}.{name.lower()}"), name)
    return baseline
