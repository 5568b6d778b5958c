"""AlphaDecay: module-wise weight decay from heavy-tailed spectra (He et al., NeurIPS 2025, arXiv 2506.14562)."""

from alphadecay.analysis import analyze
from alphadecay.assignment import MAPS, assign_decays
from alphadecay.balancer import AlphaDecay
from alphadecay.baselines.adadecay import AdaDecay
from alphadecay.baselines.awd import AWD
from alphadecay.decay_hooks import install_decay_hooks
from alphadecay.modules import SCOPES, balanced_modules
from alphadecay.param_groups import split_hidden
from alphadecay.spectral.eigenvalues import eigenvalues
from alphadecay.spectral.power_law import METHODS, PowerLaw, UndefinedPowerLaw, fit_power_law
from alphadecay.spectral.statistics import METRICS

__version__ = "0.1.0"
__all__ = [
    "AWD",
    "MAPS",
    "METHODS",
    "METRICS",
    "SCOPES",
    "AdaDecay",
    "AlphaDecay",
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
