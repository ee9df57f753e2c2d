"""A lung phantom with known motion."""
