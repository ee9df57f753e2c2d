"""DICOM registration objects; structure sets and dose mapped to the other scan."""
