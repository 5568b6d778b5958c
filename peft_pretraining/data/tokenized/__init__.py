"""Tokenized data on disk: format, writer, reader and cache. May import `sources`, `sequences`."""
