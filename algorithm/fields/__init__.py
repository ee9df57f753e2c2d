"""The resulting map: transform, inverse, folding and its repair, quality, expected error."""
