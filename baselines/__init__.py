"""What the algorithm is compared with."""
