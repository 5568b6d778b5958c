"""From a weight matrix to its statistics: eigenvalues, power law, many matrices at once. Imports nothing else of alphadecay."""
