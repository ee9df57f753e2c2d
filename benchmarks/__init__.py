"""Measurements on the machine at hand. Nothing here is asserted by a test."""
