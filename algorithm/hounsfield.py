"""Hounsfield units (HU): air and water are the two points of the scale."""

AIR_HU = -1000.0
