"""Command-line flags of the method, in the published spelling, and the presets of `--method`.

Importing these modules does not load torch: they import what they build inside the functions that
build it.
"""
