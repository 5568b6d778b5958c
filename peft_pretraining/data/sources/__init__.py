"""Sources of documents: C4, local files, docstrings of installed packages."""
