"""Minimisation of the objective for one pair, from the field of the cascade."""
