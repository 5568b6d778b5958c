"""Files and folders. Imports only the errors."""
