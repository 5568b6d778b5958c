"""Command-line parsers of the two training scripts, and what runs a script. Imports no torch."""
