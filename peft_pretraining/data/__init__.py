"""From a source of documents to the batches of a rank."""
