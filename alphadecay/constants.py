"""Names of the choices that users make.

This module does not load torch, so that a command line can list the choices at once.
"""

METRICS = (
    "alpha",
    "alphahat",
    "spectral_norm",
    "fnorm",
    "stable_rank",
    "entropy",
    "gradnorm",
    "gradnorm_d_weightnorm",
    "alpha_farms",
)
"""Statistics by which modules can be scored, see `alphadecay.spectral.statistics`."""

MAPS = ("tb_linear_map", "tb_sqrt", "tb_log2", "layerwise_sigmoid", "tb_quantile")
"""Maps from scores to weight decays, see `alphadecay.assign_decays`."""

FIT_METHODS = ("median", "median-paper", "goodness-of-fit", "fix-finger", "fix-finger-reference")
"""Ways to choose the threshold of a power-law fit, see `alphadecay.fit_power_law`."""

SCOPES = ("reference", "all_blocks")
"""Which modules are balanced, see `alphadecay.balanced_modules`."""

BATCHNORM_TYPES = ("name", "align")
"""How a BatchNorm2d finds its convolution, see `alphadecay.modules.batchnorm_followers`."""
