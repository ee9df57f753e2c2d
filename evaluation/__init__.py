"""Measures the quality of a registration on its written displacement field: landmarks, labels, surfaces and foldings.

This package is independent of the algorithm on purpose, as a second opinion. It imports only the packages in
requirements.txt beside this file, `imagefiles`, which reads files for both, and `resultpages`, which makes the pages of
both. Arrays are in the order (z, y, x), vectors have components (x, y, z) in mm along the world axes (LPS), as in ITK.
"""
