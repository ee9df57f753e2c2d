"""DICOM registration objects, structure sets and dose, carried to the other scan."""
