"""Baselines that set weight decays without a spectrum: AWD and AdaDecay."""

from alphadecay.deprecated import warn_deprecated


def __getattr__(name: str) -> type:
    """Import AWD and AdaDecay from this package, where they were before, with a warning."""
    if name == "AWD":
        from alphadecay.baselines.awd import AWD as baseline
    elif name == "AdaDecay":
        from alphadecay.baselines.adadecay import AdaDecay as baseline
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_deprecated(f"alphadecay.baselines.{name}", f"alphadecay.{name}")
    return baseline
