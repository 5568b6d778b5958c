"""Tokenized data on disk: format, writer, reader and cache."""
