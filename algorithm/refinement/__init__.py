"""Minimisation of the objective for one pair, starting from the field of the cascade."""
