"""Baselines that set weight decays without a spectrum: AWD and AdaDecay."""
