"""Public data sets: from the formats they come in to folders with pairs, see `training.datasets.__main__`."""
