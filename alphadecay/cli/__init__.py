"""Command-line flags of the method, in the published spelling, and the presets of `--method`."""
