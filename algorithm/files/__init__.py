"""Input and output files: finding them, reading them with all checks, and writing each one completely or not at all."""
