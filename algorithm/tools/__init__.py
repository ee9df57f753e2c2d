"""What is done with results: points matched between two scans, series over time, scenes of 3D Slicer."""
