"""Files, folders, locks and the cache folder. May import constants and errors."""
