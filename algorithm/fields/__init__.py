"""The resulting transform: inverse, folding and its repair, quality, expected error."""
