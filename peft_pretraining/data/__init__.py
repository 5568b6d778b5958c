"""From the data set's name to a rank's batches. May import `utils`, `errors`, `constants`."""
