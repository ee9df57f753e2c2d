"""How good is a registration? Landmarks, labels, surfaces and foldings, measured on the written displacement field.

A second opinion on purpose: nothing here imports the algorithm, only what requirements.txt beside this file lists, and
`imagefiles`, which reads files for both, and `resultpages`, which makes the pages of both.
Arrays are in the order (z, y, x), vectors have components (x, y, z) in mm along the world axes (LPS), as in ITK.
"""
