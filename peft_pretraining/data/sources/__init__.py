"""Sources of documents, and their split into training and validation. May import `utils`."""
