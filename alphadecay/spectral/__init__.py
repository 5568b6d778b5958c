"""From weights to statistics: eigenvalues, power-law fits, many weights at once.

Imports nothing else of alphadecay but its constants.
"""
