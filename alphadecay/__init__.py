"""AlphaDecay: module-wise weight decay from heavy-tailed spectra.

The method is that of He et al., NeurIPS 2025 (arXiv 2506.14562). Importing this package loads
nothing else: each public name is imported from its module when it is first used, so that a
command line can print its help without waiting for torch.
"""

import importlib
from typing import TYPE_CHECKING

from alphadecay import deprecated

__version__ = "0.1.0"
__all__ = [
    "AWD",
    "FIT_METHODS",
    "MAPS",
    "METRICS",
    "SCOPES",
    "AdaDecay",
    "AlphaDecay",
    "Controls",
    "PowerLaw",
    "UndefinedPowerLaw",
    "analyze",
    "assign_decays",
    "balanced_modules",
    "eigenvalues",
    "fit_power_law",
    "install_decay_hooks",
    "split_hidden",
]

if TYPE_CHECKING:
    from alphadecay.analysis import analyze
    from alphadecay.assignment import assign_decays
    from alphadecay.balancer import AlphaDecay
    from alphadecay.baselines.adadecay import AdaDecay
    from alphadecay.baselines.awd import AWD
    from alphadecay.constants import FIT_METHODS, MAPS, METRICS, SCOPES
    from alphadecay.controls import Controls
    from alphadecay.decay_hooks import install_decay_hooks
    from alphadecay.modules import balanced_modules
    from alphadecay.param_groups import split_hidden
    from alphadecay.spectral.eigenvalues import eigenvalues
    from alphadecay.spectral.power_law import PowerLaw, UndefinedPowerLaw, fit_power_law
else:
    _MODULE_OF = {
        "AWD": "baselines.awd",
        "FIT_METHODS": "constants",
        "MAPS": "constants",
        "METRICS": "constants",
        "SCOPES": "constants",
        "AdaDecay": "baselines.adadecay",
        "AlphaDecay": "balancer",
        "Controls": "controls",
        "PowerLaw": "spectral.power_law",
        "UndefinedPowerLaw": "spectral.power_law",
        "analyze": "analysis",
        "assign_decays": "assignment",
        "balanced_modules": "modules",
        "eigenvalues": "spectral.eigenvalues",
        "fit_power_law": "spectral.power_law",
        "install_decay_hooks": "decay_hooks",
        "split_hidden": "param_groups",
    }

    def __getattr__(name):
        """Import a public name, or a sub-module such as `alphadecay.modules`, on first use."""
        name_today = deprecated.renamed_attribute("", name) or name
        if name_today in _MODULE_OF:
            module = importlib.import_module(f"alphadecay.{_MODULE_OF[name_today]}")
            value = getattr(module, name_today)
            if name_today == name:
                globals()[name] = value
            return value
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"alphadecay.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"alphadecay.{name}":
                    raise
        raise AttributeError(f"module 'alphadecay' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


deprecated.install_finder()
