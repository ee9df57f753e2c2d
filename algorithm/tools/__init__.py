"""Uses of results: matching points of two scans, series over time, scenes of 3D Slicer."""
